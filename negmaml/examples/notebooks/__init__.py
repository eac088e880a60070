"""Four notebooks to read, run and change, each next to its script in percent format.

    python -m negmaml.examples.notebooks FOLDER     copy them into a folder
    python -m negmaml.examples.notebooks.first_ten_minutes      run one as a script

    first_ten_minutes    from one gradient step to theory, simulation and a network
    pupils_in_schools    a file of rows in groups: a decision, a model, predictions
    own_model            a model and a distribution of tasks of your own
    cluster_sweep        a study of many cells, on a laptop and in the jobs of a cluster

They need the extras "all" and "examples", and Jupyter or an editor that opens notebooks. A script
runs when it is imported.
"""
