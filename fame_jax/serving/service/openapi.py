"""The description of the routes: an OpenAPI 3.1 document, and the same as a page."""

import html
import json
from typing import Any

import fame_jax
from fame_jax.serving.service.bodies import Limits

Json = dict[str, Any]

IDS = {'type': 'array', 'items': {'$ref': '#/components/schemas/Id'}}
TEXT, NUMBER, WHOLE = {'type': 'string'}, {'type': 'number'}, {'type': 'integer'}
FLAG = {'type': ['boolean', 'null']}
VERSION = {
    'version': {**TEXT, 'description': 'name of the export that answered'},
    'digest': {**TEXT, 'description': 'start of the SHA-256 of its SHA256SUMS'},
}
STATUSES = {
    '400': 'The body is not JSON, or the Host header is not one name.',
    '401': 'The token is missing or wrong.',
    '403': 'The request is that of another web page, or under another host name.',
    '404': 'There is no such route.',
    '405': 'The route takes another method.',
    '408': 'The body came too slowly.',
    '413': 'The body is too long.',
    '415': 'The content type is not application/json.',
    '422': 'A member is missing, unknown, of a wrong type or over a limit; `field` names it.',
    '500': 'A fault of the program or of the model.',
    '503': 'Too many requests wait, or the server stops; try again.',
    '504': 'There was no answer in time.',
}
OF_BODIES = ('408', '413', '415', '422', '503', '504')
EXAMPLES = {
    '/recommend': {'history': ['7', '12'], 'k': 5, 'deny': ['40']},
    '/similar': {'item': '7', 'k': 5},
    '/explain': {'items': ['7', '12'], 'k': 5},
}


def document(limits: Limits, has_token: bool, has_page: bool) -> Json:
    """The OpenAPI document.

    Args:
      limits: of requests.
      has_token: whether requests need a token.
      has_page: whether the routes of the page are served.
    """
    k = {**WHOLE, 'minimum': 1, 'maximum': limits.k}
    history = {**IDS, 'maxItems': limits.items, 'description': 'item ids, the oldest first'}
    answer = {'$ref': '#/components/schemas/Recommendation'}
    recommend = {
        'history': history,
        'histories': {
            'type': 'array',
            'items': history,
            'minItems': 1,
            'maxItems': limits.histories,
            'description': 'several histories, in place of history',
        },
        'k': {**k, 'default': min(20, limits.k), 'description': 'length of each list'},
        'filter_seen': {
            **FLAG,
            'description': 'whether items of the history are left out; null: as the export says',
        },
        'allow': {**IDS, 'description': 'the only items that may be recommended; null: all'},
        'deny': {**IDS, 'description': 'items that may not be recommended'},
    }
    similar = {
        'item': {'$ref': '#/components/schemas/Id'},
        'k': {**k, 'default': min(10, limits.k)},
        'by': {'description': 'which vectors are compared; see Recommender.similar_items'},
    }
    recommended = {
        **VERSION,
        'unknown_filters': {**IDS, 'description': 'ids of allow and deny that are not known'},
        'recommendations': {'type': 'array', 'items': answer},
    }
    paths = {
        '/recommend': _post('Recommends items to histories.', recommend, [], recommended),
        '/similar': _post(
            'Finds the items most similar to an item.',
            similar,
            ['item'],
            {**VERSION, 'recommendation': answer},
        ),
        '/health': _get('Says whether the server answers.', {'status': TEXT, **VERSION}),
        '/metadata': _get(
            'The export: where model and data come from, its metrics, and the limits.',
            {**VERSION, 'num_items': WHOLE, 'max_length': WHOLE, 'card': {'type': 'object'}},
        ),
        '/metrics': _get('Counts and durations, as Prometheus reads them.', None, 'text/plain'),
        '/openapi.json': _get('This description.', {}),
        '/docs': _get('This description as a page.', None, 'text/html'),
    }
    if has_page:
        items = {'type': 'array', 'items': {'type': 'object'}}
        shown = {'items': IDS, 'k': k, 'filter_seen': FLAG}
        paths |= {
            '/': _get('The page: build a history, see its list.', None, 'text/html'),
            '/items': _get('Finds items by words of titles and ids.', {'items': items}),
            '/similar_items': _get('Items similar to one, by each head.', {'lists': items}),
            '/card': _get('The export, for the page.', {}),
            '/explain': _post('Recommends items and says why.', shown, ['items'], {}),
        }
        limit = {'name': 'limit', 'in': 'query', 'schema': {**WHOLE, 'minimum': 1, 'maximum': 100}}
        for path, name in (('/items', 'q'), ('/similar_items', 'item')):
            text = {'name': name, 'in': 'query', 'schema': TEXT}
            paths[path]['get']['parameters'] = [text, limit]
    for path, methods in paths.items():
        for operation in methods.values():
            if path in EXAMPLES:
                content = operation['requestBody']['content']['application/json']
                content['example'] = EXAMPLES[path]
            if has_token and path != '/health':
                operation['security'] = [{'token': []}]
                operation['responses']['401'] = _error('401')
    schemas = {
        'Id': {'type': ['string', 'integer'], 'description': '7 and "7" are the same item'},
        'Recommendation': _object(
            {
                'items': {**IDS, 'description': 'best first; fewer than k where no more are left'},
                'scores': {'type': 'array', 'items': NUMBER},
                'score_kind': {**TEXT, 'description': 'scores of two kinds cannot be compared'},
                'unknown': {**IDS, 'description': 'ids of the history that are not known'},
                'fallback': {**TEXT, 'description': 'popularity if no id of the history is known'},
                'titles': {'type': 'array', 'items': TEXT},
            }
        ),
        'Error': _object(
            {'error': _object({'code': TEXT, 'message': TEXT, 'field': TEXT, 'limit': NUMBER})}
        ),
    }
    components: Json = {'schemas': schemas}
    if has_token:
        components['securitySchemes'] = {'token': {'type': 'http', 'scheme': 'bearer'}}
    return {
        'openapi': '3.1.0',
        'info': {'title': 'fame_jax', 'version': fame_jax.__version__},
        'paths': paths,
        'components': components,
    }


def page(description: Json) -> str:
    """The document as one HTML page that loads nothing."""
    parts = []
    for path, methods in description['paths'].items():
        for method, operation in methods.items():
            parts.append(f'<h2>{method.upper()} {html.escape(path)}</h2>')
            parts.append(f'<p>{html.escape(operation["summary"])}</p>')
            body = operation.get('requestBody', {}).get('content', {}).get('application/json')
            if body:
                call = f"curl -H 'Content-Type: application/json' {{address}}{path} -d "
                call += f"'{json.dumps(body['example'])}'"
                parts += [f'<pre>{html.escape(call)}</pre>', _members(body['schema'])]
            parts.append('<p>Answers:</p>')
            for status, response in operation['responses'].items():
                line = f'<b>{status}</b> {html.escape(response["description"])}'
                parts.append(f'<p class="status">{line}</p>')
                for content in response.get('content', {}).values() if status == '200' else ():
                    parts.append(_members(content.get('schema', {})))
    answer = _members(description['components']['schemas']['Recommendation'])
    return PAGE.replace('{version}', description['info']['version']).replace(
        '{body}', '\n'.join([*parts, '<h2>A recommendation</h2>', answer])
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>fame_jax: the server's routes</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem }
h2 { font: bold 1.1rem monospace; border-top: 1px solid #ccc; padding-top: 1rem }
pre { background: #f4f4f4; padding: .5rem; overflow-x: auto }
td { padding: 0 1rem 0 0; vertical-align: top } .status { margin: 0 0 0 1rem }
</style>
</head>
<body>
<h1>fame_jax {version}</h1>
<p>Errors are <code>{"error": {"code", "message", ...}}</code>. The same as
<a href="/openapi.json">an OpenAPI document</a>.</p>
{body}
</body>
</html>
"""


def _members(schema: Json) -> str:
    rows = ''.join(
        f'<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_kind(value))}</td>'
        f'<td>{html.escape(value.get("description", ""))}</td></tr>'
        for name, value in schema.get('properties', {}).items()
    )
    return f'<table>{rows}</table>'


def _kind(schema: Json) -> str:
    if '$ref' in schema:
        return schema['$ref'].rpartition('/')[2]
    kind = schema.get('type', 'any')
    if kind == 'array':
        kind = f'list of {_kind(schema["items"])}'
    elif isinstance(kind, list):
        kind = ' or '.join(kind)
    limit = schema.get('maxItems', schema.get('maximum'))
    return f'{kind}, at most {limit:,}' if limit else kind


def _object(properties: Json, required: list[str] | None = None) -> Json:
    return {'type': 'object', 'properties': properties, 'required': required or []}


def _error(status: str) -> Json:
    schema = {'$ref': '#/components/schemas/Error'}
    content = {'application/json': {'schema': schema}}
    return {'description': STATUSES[status], 'content': content}


def _get(summary: str, properties: Json | None, kind: str = 'application/json') -> Json:
    content = {} if properties is None else {'schema': _object(properties)}
    answers = {'200': {'description': 'The answer.', 'content': {kind: content}}}
    answers |= {status: _error(status) for status in ('400', '403')}
    return {'get': {'summary': summary, 'responses': answers}}


def _post(summary: str, properties: Json, required: list[str], answer: Json) -> Json:
    operation = _get(summary, answer)['get']
    schema = _object(properties, required) | {'additionalProperties': False}
    body = {'required': True, 'content': {'application/json': {'schema': schema}}}
    operation['requestBody'] = body
    operation['responses'] |= {status: _error(status) for status in OF_BODIES}
    return {'post': operation}
