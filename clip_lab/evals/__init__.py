"Evaluations: what a model knows, each number with its n and its interval (paper, Sections 3 to 5)."
