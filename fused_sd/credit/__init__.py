"""What a teacher says about each token of a response: measured, shown, scored.

row = credit_map(student_hidden, head, teacher_hidden, head, token_ids, decode=tokenizer.decode)
save_html(row, "map.html"), save_png(row, "map.png"), print_map(row)
"""

from fused_sd.credit.html import html_page, save_html
from fused_sd.credit.measure import CreditMeasures, credit_map, credit_measures, token_texts
from fused_sd.credit.png import credit_figure, save_png
from fused_sd.credit.score import PlantedErrorScores, planted_error_scores
from fused_sd.credit.terminal import plain_text, print_map
from fused_sd.credit.tokens import VALUES, CreditMap, CreditRow, TokenCredit, TopToken

__all__ = [
    "VALUES",
    "CreditMap",
    "CreditMeasures",
    "CreditRow",
    "PlantedErrorScores",
    "TokenCredit",
    "TopToken",
    "credit_figure",
    "credit_map",
    "credit_measures",
    "html_page",
    "plain_text",
    "planted_error_scores",
    "print_map",
    "save_html",
    "save_png",
    "token_texts",
]
