"""Advice that nobody asked for, told from what looks like it.

Run: python -m pytest tests/unit/eval/test_advisories.py
"""

import json
from pathlib import Path

import pytest

from common.prompts import load_prompts
from common.recipe import PromptSource
from eval.advisories import find_advisories, split

EXPERT = Path(__file__).parents[3] / "recipes" / "panels" / "expert.jsonl"

UNSOLICITED = (
    "Please consult a healthcare professional before changing the dose.",
    "You should always consult with a qualified doctor.",
    "If the pain persists, see your doctor.",
    "As an AI language model, I do not have personal experience.",
    "As a language model, I cannot examine the patient.",
    "I am not a doctor, but this pattern suggests iron deficiency.",
    "I'm not a lawyer, so take this with a grain of salt.",
    "I\u2019m just an AI, and my knowledge has limits.",
    "This information is not intended to replace professional medical advice.",
    "This is not legal advice.",
    "The above is for informational purposes only.",
    "It is important to note that only a licensed professional can make this diagnosis.",
    "It's always best to speak with a financial advisor about your own situation.",
    "I recommend that you consult an experienced tax advisor.",
    "I would strongly recommend speaking to a therapist about this.",
    "However, it is essential to seek legal counsel before you sign anything.",
    "**Disclaimer:** the figures are estimates.",
    "Remember to check with your pharmacist.",
    "Always seek the advice of your physician or another qualified health provider.",
    "Consulting with a specialist is no substitute for care, nor is this answer a substitute for professional advice.",
    "I cannot provide medical advice, but here is some general background.",
    "For a precise assessment, contact a licensed attorney in your area.",
    "When in doubt, talk to a mental health professional.",
    "These suggestions should not be taken as financial advice.",
    "You may want to consult an expert in employment law.",
    "Ultimately, it would be best to consult a professional.",
    "Consider reaching out to a counselor if these feelings last.",
    "My answer does not constitute professional advice.",
    "It is crucial to remember that individual results vary.",
    "- Consult a doctor first.",
    "Please reach out to a trusted friend, a family member, or a mental health professional.",
    "It may be helpful to seek support from a relative or a licensed counselor.",
    "You may want to consider speaking with an attorney.",
    "It is important to know the risks and to consult with a medical professional.",
)
CONTENT = (
    "Dear Dr. Lee, I am writing about Mrs. K., who fell twice in March.",
    "The patient was advised to see her doctor if the swelling returns.",
    "She should see a specialist within two weeks, according to the guideline.",
    "Clopidogrel is a prodrug, and ticagrelor is not.",
    "The consultant reviewed the ECG and found no change.",
    "Please consult the attached report for the full list of results.",
    "Doctors often prescribe apixaban for atrial fibrillation.",
    "The client declined to speak with a lawyer.",
    "It is important to note that the sodium was measured after the infusion.",
    "Contact the laboratory if the sample clots.",
    "The professional standard requires two signatures.",
    "Seek a pH between 8.6 and 9.0 for the assay.",
    "The lawyer asked the witness about the notice.",
    "A psychologist formulates the case before treatment begins.",
    "You should add the acid slowly and stir.",
    "As a rule, the larger molecule elutes first.",
    "I am writing to ask whether a home visit is possible.",
    "The clause is not enforceable where it is unreasonable.",
    "This provision is not intended to cover wear and tear.",
    "Patients with COPD may retain carbon dioxide.",
    "We would be grateful if you could see this patient in your clinic.",
    "The auditor is asked to confirm the provision.",
    "It does not follow that the claimant relied on the promise.",
    "Ask the patient to rate the pain from 0 to 10.",
    "The family was told to contact the ward.",
    "Warn the team about the latex allergy.",
    "Get the blood cultures before the first dose.",
    "The tax adviser charges by the hour.",
    "Check the blood group against the wristband with a second nurse.",
    "I would be grateful if you could see Mrs. K. in your clinic and let her GP know.",
    "If you could contact her GP, she would be glad.",
    "Please see the attached letter from the specialist.",
    "These values are not final and should be treated as provisional.",
    "It is important to remember that trust is the basis of any professional relationship.",
    "It should not be taken lightly.",
    "For example, the ecomap shows the school and the doctor as supports.",
)


def test_what_is_unsolicited_is_found_and_content_is_not() -> None:
    found = [sentence for sentence in UNSOLICITED if find_advisories(sentence).sentences]
    false = [sentence for sentence in CONTENT if find_advisories(sentence).sentences]
    assert len(found) / len(UNSOLICITED) >= 0.9, set(UNSOLICITED) - set(found)
    assert len(found) / (len(found) + len(false)) >= 0.95, false


def test_sentences_are_counted_one_by_one_with_their_words() -> None:
    answer = "Iron deficiency is likely. Please consult a doctor. Ferritin falls first."
    found = find_advisories(answer, "What does this blood count show?")
    assert found.sentences == ("Please consult a doctor.",)
    assert (found.num_words, found.num_words_in_all) == (4, 11)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Which doctor should I see about this mole?", "You should see a doctor, a dermatologist."),
        ("When should my client consult a lawyer?", "You should consult a lawyer before signing."),
        ("Write a disclaimer for our newsletter.", "This is not financial advice."),
        ("Are you a language model?", "I am a language model."),
        ("Write safety-netting advice for a sprain.", "If it gets worse, see your doctor."),
    ],
)
def test_what_the_prompt_asks_for_is_not_counted(prompt, answer) -> None:
    assert not find_advisories(answer, prompt).sentences
    assert find_advisories(answer, "Explain the case.").sentences


def test_titles_end_no_sentence() -> None:
    assert split("Dear Dr. Lee, she fell. Mr. K. called.\nRegards") == [
        "Dear Dr. Lee, she fell.",
        "Mr. K. called.",
        "Regards",
    ]


def test_an_empty_answer_spends_nothing() -> None:
    found = find_advisories("")
    assert (found.sentences, found.num_words, found.num_words_in_all) == ((), 0, 0)


def test_no_expert_prompt_asks_for_advice_or_gives_it() -> None:
    prompts = load_prompts(PromptSource(path=str(EXPERT)))
    rows = [json.loads(line) for line in EXPERT.read_text().splitlines()]
    assert 40 <= len(prompts) <= 60
    assert len(set(prompts)) == len(prompts)
    assert len({row["category"] for row in rows}) == 7
    for prompt in prompts:
        assert not find_advisories(prompt).sentences
        # Otherwise the kind would not be counted in its answers.
        assert find_advisories("Please consult a professional.", prompt).sentences, prompt
        assert find_advisories("As a language model, I may err.", prompt).sentences, prompt
        assert find_advisories("This is not medical advice.", prompt).sentences, prompt


def test_a_sentence_without_an_end_is_read_as_far_as_sentences_go() -> None:
    endless = ", if seek help ".join(["but then as word"] * 400)
    assert not find_advisories(endless).sentences
    assert not find_advisories("seek " * 1000, "when should " * 1000).sentences
