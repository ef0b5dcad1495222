"""What the demo's tokenizer is trained on."""

# ruff: noqa: RUF001

TEXT = """\
A mixture of experts is a layer made of many small networks and one router. The router looks at a token, gives every
expert a score, and sends the token to the few that score highest. The token comes back as the weighted sum of what
those experts made of it. So a model can hold a great many weights and still use only a few of them for each word.

The work for a machine is less simple than it sounds. Tokens arrive in the order of the text, but a matrix product wants
all the rows of one expert side by side. First the kernels count how many rows each expert will get, and where each
expert's rows begin. Then they copy the rows into that order, or read them from where they lie. One grouped product
serves all experts at once, however many rows each of them has: some have hundreds, some have one, some have none. In
the end the rows go back to their tokens, and the sum is taken in a fixed order, so that the same input gives the same
bits.

When a model writes a text one token at a time, there are few rows and many weights. Then nothing matters but how fast
the weights of the chosen experts can be read, and every byte should be read only once. When a model reads a long text,
there are many rows, and what matters is how well the units that multiply are fed.

for token in text:
    scores = router(token)
    chosen = scores.topk(k=8)
    token = sum(weight * experts[e](token) for e, weight in chosen)

Une couche clairsemée choisit, pour chaque mot, quelques experts parmi beaucoup d'autres, et additionne leurs réponses.
Jedes Wort geht nur zu wenigen Fachleuten; die übrigen müssen nicht rechnen, und trotzdem lernt das ganze Modell mit.
Cada palabra visita a unos pocos expertos, y el resultado es la suma de lo que cada uno de ellos ha añadido.
Каждое слово попадает лишь к нескольким экспертам, а остальные в это время отдыхают.
每個詞只交給少數幾位專家處理，再把他們的結果加起來。単語ごとに、いくつかの専門家だけが働きます。
"""
