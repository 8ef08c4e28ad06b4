-- Beside the database `ft`, which the image makes: MLflow's own.
CREATE DATABASE mlflow;
