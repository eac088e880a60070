"""The theory for inputs with any covariance."""
