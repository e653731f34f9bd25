"""Public sentences for calibrating and testing text models, written for this project. Give your own for other domains.

``SENTENCES`` set a text model's ranges. ``HELD_OUT`` are others, which measure how close a compiled model stays to the
original; they must not be used for calibration. The last is long enough to fill 128 tokens, and texts are cut to the
model's length. ``REPEATED`` are words and signs that fill a text alone, as lines of dots and tables of contents do: the
hidden states of such tokens grow beyond those of prose.
"""

SENTENCES = (
    "A cat sits on the mat.",
    "Private inference keeps the question hidden from the one who answers it.",
    "The quick brown fox jumps over the lazy dog, again and again, until it is tired of jumping.",
    "How do I reset the password of my account?",
    "Quarterly revenue rose by 14.2 % to $3.7 million, while costs fell slightly.",
    'She said: "No, thank you!" and left without another word.',
    "Die Katze schläft, während es draußen regnet.",
    "Le ministre a annoncé une réforme qui ne plaît à personne.",
    "def add(a, b): return a + b  # adds two numbers",
    "https://example.org/index.html?page=2&sort=asc#top",
    "Patients with a fever above 39 °C who have travelled recently should see a doctor at once.",
    "This movie was terrible; the actors were bored, the plot made no sense, and it lasted three hours.",
    "What a wonderful, moving, beautifully filmed story, and what a cast!",
    "The treaty of 1648 ended the Thirty Years' War and redrew the map of Europe.",
    "ok",
    "!!! ??? ...",
    "1 2 3 4 5 6 7 8 9 10",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen, using the energy of light.",
    "BREAKING: markets tumble as central banks raise interest rates for the fifth time this year",
    "lol that was sooo funny, cant believe u did it again :) #friday",
    "The defendant shall pay the plaintiff's costs, as agreed in section 4(b) of the contract.",
    "In linear algebra, an eigenvector of a matrix is scaled, but not turned, by that matrix.",
    "Mix 200 g of flour with two eggs and a pinch of salt; let the dough rest for an hour.",
    "Train 7421 to Utrecht is delayed by twenty-five minutes because of works on the track.",
    "人工智能正在改变世界。",
    "Он не знал, что сказать.",
)

REPEATED = (
    ".",
    "no",
    "-",
    "…",
    "|",
    "Introduction ............ 7",
    "1",
    "_",
    "а",
    "的",
)

HELD_OUT = (
    "The library opens at nine, but the reading room stays locked until the caretaker has found his keys.",
    "Can I return these shoes if I have already worn them once?",
    "thanks",
    "Der Zug nach Hamburg fällt heute leider aus; bitte nehmen Sie den nächsten.",
    "for i in range(10): print(i ** 2, end=', ')",
    "Shares of the airline lost 6.8 % after it had cut its forecast for 2027 to €410 million.",
    "Honestly the best pizza I've had in years!! Slow service though :/",
    "When the surveyors reached the valley in the spring of 1911, they found a river that no map had shown, two "
    "villages whose inhabitants spoke different languages, and a bridge of rope between them that nobody remembered "
    "building. The older of the two guides refused to cross it. He had been told as a boy that it would hold exactly "
    "one thousand people, and he was sure that somebody must have been counting ever since. The engineers laughed, "
    "measured the ropes, tested the knots, and wrote in their report that the bridge was sound; then they walked four"
    " miles upstream and waded through the cold water with their instruments on their heads. In the evening they "
    "agreed that this part of the journey need not be mentioned, and it was not, until one of them told his "
    "granddaughter.",
)
