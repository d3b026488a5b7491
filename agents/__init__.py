"""Reference agents, one readable file each; they import lede_env, never the reverse."""
