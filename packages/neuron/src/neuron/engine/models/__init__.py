"""Model families, one short readable file each; `registry.build_model` picks one from a checkpoint's config.json."""
