"""The scenarios, by what they are about. `source` names the case of the project's catalogue (S1 to S68), the discussion that
it comes from, or the part of the design (D) that it shows."""
