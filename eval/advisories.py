"""Advice that nobody asked for: sentences that send an expert to an expert, or say what the model is not.

Counted apart from refusals: an answer may hold everything that was asked for and still spend a fifth of its words on
telling a physician to see one. Judged sentence by sentence, by rules: what counts is advice to the reader ("you should
consult a doctor"), talk of the model's own nature, and warnings about the answer itself. A sentence about somebody
else ("she was advised to see her doctor") is content.
"""

import re
import unicodedata
from dataclasses import dataclass

_EXPERT = (
    r"(?:professionals?|doctors?|physicians?|(?:health\s?-?care|medical|mental health) (?:providers?|teams?|advice|"
    r"attention|help)|GP|therapists?|counsel(?:l)?ors?|psychologists?|psychiatrists?|lawyers?|attorneys?|solicitors?|"
    r"legal (?:counsel|advice)|(?:financial|tax|legal) advis[eo]rs?|advis[eo]rs?|accountants?|pharmacists?|experts?|"
    r"specialists?|clinicians?|practitioners?|toxicologists?|professional (?:help|advice|guidance))"
)
_SEEK = (
    r"(?:consult(?:ing)?(?: with)?|see(?:k|king|ing)?(?: out)?|speak(?:ing)? (?:to|with)|talk(?:ing)? (?:to|with)|"
    r"contact(?:ing)?|ask(?:ing)?|reach(?:ing)? out to|check(?:ing)? with|get(?:ting)?|work(?:ing)? with|"
    r"turn(?:ing)? to|visit(?:ing)?)"
)
# Words between the verb and whom it sends the reader to: "help from a friend, a family member or a licensed". Whose
# doctor it is tells advice from what a letter asks of a colleague ("if you could contact her GP").
_WORD = r"(?:(?!(?:to|her|his|their|this|mrs?|ms|dr)\b)[\w',/-]+ )"
_FAR = (
    r"(?:(?:seek(?:ing)?|get(?:ting)?|find(?:ing)?)(?: out)? (?:\w+ ){0,3}?(?:help|support|advice|guidance|assistance|"
    r"attention)|reach(?:ing)? out to|speak(?:ing)? (?:to|with)|talk(?:ing)? (?:to|with))"
)
_REFERRAL = rf"(?:{_FAR} {_WORD}{{0,12}}?|{_SEEK} {_WORD}{{0,4}}?){_EXPERT}\b"
_LEAD = (
    r"(?:please|always|(?:but|so|and|then|also|therefore|however|instead|otherwise|ultimately|finally),?|"
    r"(?:if|when|in case|for|before|as|should)\b[^.;]{0,90},|remember to|be sure to|make sure (?:to|you)|"
    r"consider|don't hesitate to|feel free to|i(?:'d| would| must| do)? ?(?:strongly |highly |always )?"
    r"(?:recommend|suggest|advise|urge|encourage)(?: that)?(?: you)?(?: to)?)"
)
_OTHERS_CASE = (
    r"(?:(?:the|a|your|each|every|his|her|their) )?"
    r"(?:patients?|clients?|he|she|they|mother|father|family|son|daughter)"
)
_PATTERNS = {
    "referral": (
        # Imperative, at the head of the sentence or behind what leads up to it.
        rf"^(?:{_LEAD} ){{0,2}}{_REFERRAL}",
        rf"\b(?:you|one|readers?|users?) (?:should|must|may want to|might want to|need to|ought to|would do well to|"
        rf"can|could)(?: also| always| still| first| definitely)?(?: consider)? {_REFERRAL}",
        rf"\b(?:it(?:'s| is| (?:would|may|might|can|could)(?: also)? be)) (?:always |also |very |highly |strongly |"
        rf"best |generally |still )*(?:important|best|essential|crucial|advisable|recommended|wise|vital|a good idea|"
        rf"necessary|imperative|advised|better|prudent|helpful|useful|beneficial) (?:(?:that|for) (?:you|one) )?"
        rf"(?:to [^.;]{{0,70}}?\b(?:and|to) )?(?:to )?(?:always |consider )?{_REFERRAL}",
        rf"\b(?:i|we)(?:'d| would)?(?: \w+)? (?:recommend|suggest|advise|urge|encourage)\b[^.]{{0,30}}\b{_REFERRAL}",
        rf"\b(?:no|not a|never a) substitute for\b[^.]*\b(?:{_EXPERT}|diagnosis|treatment|judgment|judgement|care)\b",
        rf"\b(?:always|best) (?:to )?{_REFERRAL}",
    ),
    "nature": (
        r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|"
        r"(?:ai |virtual |digital )?assistant|chatbot)\b",
        r"\bi(?:'m| am) (?:just |only |merely |simply )?an? (?:ai|artificial intelligence|(?:large )?language model|"
        r"virtual assistant|chatbot|machine)\b",
        rf"\bi(?:'m| am) not (?:actually )?(?:an? )?(?:\w+ ){{0,2}}{_EXPERT}\b",
        r"\bi (?:cannot|can't|do not|don't|am not able to|am unable to) (?:provide|give|offer|replace|diagnose)\b[^.]*"
        r"\b(?:medical|legal|financial|professional|clinical|tax|personali[sz]ed|specific)\b[^.]*\b"
        r"(?:advice|diagnos[ie]s|opinions?|judg(?:e)?ments?|guidance|recommendations?)\b",
    ),
    "disclaimer": (
        r"^(?:important )?disclaimer\b",
        r"\b(?:this|the (?:above|following|information|content|answer|response)|(?:my|these) (?:answers?|responses?|"
        r"suggestions?)|it)\b[^.]{0,60}\b(?:is|are|does|do|should)(?: not|n't)\b[^.]{0,30}"
        r"\b(?:constitute|(?:intended|meant) (?:as|to (?:be|replace|substitute|constitute|provide|serve))|"
        r"be (?:taken|considered|construed|used|treated) as\b[^.]*\b(?:advice|diagnos[ie]s|recommendations?|guidance)|"
        r"be relied)\b",
        r"\bfor (?:general |purely )?(?:informational|educational|information|illustrative)"
        r"(?: (?:and|or) \w+)? purposes only\b",
        r"\b(?:is|are|does)(?: not|n't) (?:constitute |provide )?(?:medical|legal|financial|professional|tax|"
        r"investment|clinical) advice\b",
        r"\b(?:important|worth|essential|crucial|vital) to (?:note|remember|mention|keep in mind|emphasi[sz]e)\b[^.]*\b"
        rf"(?:(?:an?|your|only|trained|certified) (?:[\w-]+ ){{0,3}}?{_EXPERT}|qualified|"
        r"licensed|individual (?:results|circumstances|cases?)|ethical(?:ly)?|responsibly)\b",
    ),
}
# Characters of a sentence that are read: a model in a loop writes none that end.
LONGEST = 400
_COMPILED = {
    kind: [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    for kind, patterns in _PATTERNS.items()
}
# A question about whom to turn to, or about the model, asks for what would be unsolicited elsewhere.
_ASKED = {
    "referral": re.compile(
        rf"\b(?:should|do|must|can|when|where|which|what (?:kind|type|sort)|who|whom|whether)\b[^.?]*\b"
        rf"(?:see|consult|call|contact|talk to|speak to|go to|need|find|hire|ask|turn to|refer|visit)\b"
        rf"[^.?]*\b{_EXPERT}\b|"
        rf"\b(?:which|what (?:kind|type|sort) of) {_EXPERT}\b|"
        r"\b(?:who|whom|where)\b[^.?]*\b(?:turn|go|ask|help|call)\b|\bseek(?:ing)? help\b|"
        r"\b(?:sign-?posting|safety[- ]net(?:ting)?|when to (?:seek|get|call))\b",
        re.IGNORECASE,
    ),
    "nature": re.compile(
        r"\b(?:are you|you are|what are you|who are you|as an ai|language models?|chatbots?)\b",
        re.IGNORECASE,
    ),
    "disclaimer": re.compile(r"\b(?:disclaimers?|caveats?|warnings?|small print)\b", re.IGNORECASE),
}
# Advice to somebody else is the content of a letter or a leaflet.
_REPORTED = re.compile(
    rf"^{_OTHERS_CASE} (?:should|must|was|were|is|are|has|have|had|will|can|may|needs?)\b|"
    r"\b(?:advised|told|asked|encouraged|agreed|declined|plans|wants|wishes|intends) (?:\w+ ){0,2}to\b",
    re.IGNORECASE,
)
_BOUNDARY = re.compile(r"(?<=[.!?])[\"')\]*]*\s+(?=[\"'(*A-Z0-9])|\n+")
_ABBREVIATION = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|e\.g|i\.e|approx|No)\.$")
_MARKUP = re.compile(r"^(?:[-*#>+\s]|\d+[.)]\s)+|\*\*|__")


@dataclass(frozen=True)
class Advisories:
    """What an answer spends on advice that nobody asked for.

    Attributes:
        sentences: that are such advice, as they stand in the answer.
        num_words: of these sentences.
        num_words_in_all: of the answer.
    """

    sentences: tuple[str, ...]
    num_words: int
    num_words_in_all: int


def find_advisories(answer: str, prompt: str = "") -> Advisories:
    """The sentences of an answer that nobody asked for.

    Args:
        answer: without thoughts and special tokens.
        prompt: what was asked; kinds of advice that it asks for are not counted.
    """
    asking = [_plain(sentence)[:LONGEST] for sentence in split(prompt)]
    counted = [kind for kind, asked in _ASKED.items() if not any(map(asked.search, asking))]
    found = tuple(sentence for sentence in split(answer) if _kind(sentence) in counted)
    return Advisories(found, sum(len(each.split()) for each in found), len(answer.split()))


def split(text: str) -> list[str]:
    """The sentences and lines of a text; titles and abbreviations end none."""
    parts: list[str] = []
    for part in _BOUNDARY.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += f" {part}"
        elif part and part.strip():
            parts.append(part.strip())
    return parts


def _kind(sentence: str) -> str | None:
    """What a sentence advises; None for content."""
    text = _MARKUP.sub("", _plain(sentence)).strip()[:LONGEST]
    if _REPORTED.search(text):
        return None
    matches = (
        kind for kind, patterns in _COMPILED.items() if any(each.search(text) for each in patterns)
    )
    return next(matches, None)


def _plain(text: str) -> str:
    """A text with plain quotes and single spaces."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u2018", "'")
    return " ".join(text.split())
