"""The paper's figures, phase diagrams, and the roads that have to meet: computed and drawn."""
