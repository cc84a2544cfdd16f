"""The forward that training uses equals the one that inference uses."""

import torch

from tools.demo_networks import TINY, build, encode_text, prompt_embeds, training_velocity


def test_training_forward_equals_inference() -> None:
    """Prompts of 5, 1 and 20 tokens: one zero row weighted for all padding gives the velocity of 512 unmasked rows."""
    torch.manual_seed(0)
    networks = build(TINY)
    for parameter in networks.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(3, 400, (3, 20))
    ids[0, 5:] = 0
    ids[1, 1:] = 0
    latents, timestep = torch.randn(3, 16, 2, 4, 4), torch.tensor([10.0, 500.0, 999.0])
    rope = networks.transformer.rope(2, 4, 4)
    with torch.no_grad():
        context = networks.transformer.encode_prompt(prompt_embeds(networks.text_encoder, ids))
        expected = networks.transformer(latents, timestep, context, rope)
        rows = encode_text(networks.text_encoder, ids)
        actual = training_velocity(networks.transformer, latents, timestep, rows, rope)
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_text_rows_ignore_padding() -> None:
    """A prompt's rows are the same alone and beside a longer one, and zero after its end."""
    torch.manual_seed(1)
    encoder = build(TINY).text_encoder.eval()
    short, long = torch.randint(3, 400, (1, 4)), torch.randint(3, 400, (1, 9))
    together = torch.cat((torch.nn.functional.pad(short, (0, 5)), long))
    with torch.no_grad():
        rows = encode_text(encoder, together)
        torch.testing.assert_close(rows[0, :4], encode_text(encoder, short)[0])
    assert bool((rows[0, 4:] == 0).all())
