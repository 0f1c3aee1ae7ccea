"""Remembers how fast each model is rendered, so that there is an estimate while no worker runs."""

from sqlalchemy import text

from shared.database import transaction
from shared.services import Services

_REMEMBER = text("""
INSERT INTO model_rate AS r (model, seconds_per_work)
SELECT rate.key, avg((rate.value->>'seconds_per_work')::double precision)
FROM worker w CROSS JOIN LATERAL jsonb_each(w.rates) AS rate
WHERE w.heartbeat_at > clock_timestamp() - make_interval(secs => :lease) AND rate.value->>'seconds_per_work' IS NOT NULL
GROUP BY rate.key ORDER BY rate.key
ON CONFLICT (model) DO UPDATE SET seconds_per_work = EXCLUDED.seconds_per_work, updated_at = clock_timestamp()
WHERE r.seconds_per_work IS DISTINCT FROM EXCLUDED.seconds_per_work
""")


def run(services: Services) -> int:
    """Take over what the living workers measured."""
    with transaction(services.engine) as connection:
        return connection.execute(_REMEMBER, {"lease": services.settings.lease_seconds}).rowcount
