"""What it costs: speed and memory of the rule, the layer, the models, beside their rivals.

`flops` counts the useful products, `measure` times and weighs, `contestants` and `rivals` say
what exactly is run, `contest` runs them in turn; `layer`, `model`, `decode` and `stream` are the
four questions, `report` shows the answers.
"""
