"""What every part uses: errors, commands, argument types, output directories, JSON. Imports no other part."""
