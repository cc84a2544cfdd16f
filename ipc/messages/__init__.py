"""Every message that crosses a process border.

Two conversations and some short ones, each with its own closed set of tagged structs, encoded as MessagePack:

- a client and the server, over a stream socket in length-prefixed frames (`ipc/frames.py`, `docs/protocol.md`):
  `client`, `server`, and `status` of what is told there;
- the supervisor and a stage process, over a SOCK_SEQPACKET pair, file descriptors beside them (`ipc/channel.py`):
  `stage` and `reports`;
- the supervisor, or a command, and a process that does one thing: `loader`, `memory`, `program`, `check`, `doctor`.

`names`, `job`, `weights` and `memory` are what they speak of. Tensors travel in `TensorQueue` slots
(`ipc/tensor_queue.py`), never in messages.
"""
