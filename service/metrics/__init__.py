"""How series are kept, shown to scrapers and pushed to collectors; not what is measured."""
