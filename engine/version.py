"""The version of this engine."""

VERSION = "0.1.0"
