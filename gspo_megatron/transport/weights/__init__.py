"""The weight update's wire: which slice goes from which trainer rank to which server worker."""
