"""A multimodal search agent for veRL: tools, retrieval, rewards, data, evaluation. Copy the folder and edit it."""
