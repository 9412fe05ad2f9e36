"""The main job: a diffusion teacher and a two-step sCM student on real 8x8 digits, on a CPU."""
