"""The model behind the HTTP interface that OpenAI's clients speak. Needs the extra `server`.

app.py has the routes, guard.py who may call them, schema.py what they take and give, pictures.py and remote_images.py
how images come in, engine.py the thread that answers, fair_queue.py who is next, limits.py how much, metrics.py how it
goes, api_errors.py what is said when it does not.
"""
