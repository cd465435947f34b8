"""Credit maps show how a teacher judges each token of a student's responses.

    found = credit_map(student_hidden, head, teacher_hidden, head, ids, decode=tokenizer.decode)
    save_html(found, "map.html"), save_png(found, "map.png"), print_map(found)

``planted_error_scores`` measures whether a map finds errors that were planted on purpose.
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
