"""What memory there is and where bytes live: pages, budgets, the host arena, page files, and moves between them."""
