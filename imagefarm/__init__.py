"""imagefarm: submit prompts to a render farm, follow them, fetch the pictures."""
