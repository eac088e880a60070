"""The theory for inputs with identity covariance."""
