"""Independent references for the tests: random checkpoints in the hub's layout and a PyTorch model that reads them.

Nothing here imports mlx_fastvlm or convert. `hub_checkpoint` needs numpy only; `torch_reference` and
`make_golden` need torch, timm and transformers and are never part of the default test run.
"""
