"""Lets the first jobs of a priority class go first when nobody has come to them for long: low is late, never starved.

Only a few at a time: a class that gets its turn is not served before those above it, and a large batch that is being
rendered does not rise at all.
"""

from sqlalchemy import func, text
from sqlalchemy.dialects.postgresql import insert

from shared import lifecycle
from shared.database import transaction
from shared.models import ModelControl
from shared.services import Services
from shared.states import Priority

#: jobs of a starving class that get their turn at a time
_AT_A_TIME = 16

# starving: the first job of the class has waited for long, and for so long no worker of the model has claimed of the
# class, though of others, and no turn was given. Workers tell with each heartbeat how long ago they claimed of which.
_STARVES = text("""
WITH claims AS (
    SELECT claim.key AS priority
    FROM worker w CROSS JOIN LATERAL jsonb_each_text(COALESCE(w.claimed->:model, '{}')) AS claim
    WHERE w.heartbeat_at - make_interval(secs => claim.value::float8)
        > clock_timestamp() - make_interval(secs => :patience)),
  head AS (
    SELECT b.created_at FROM job j JOIN batch b ON b.id = j.batch_id
    WHERE j.state = 'queued' AND j.model = :model AND j.priority = :priority ORDER BY j.vt, j.id LIMIT 1)
SELECT EXISTS (SELECT FROM head WHERE created_at < clock_timestamp() - make_interval(secs => :patience))
   AND EXISTS (SELECT FROM claims)
   AND NOT EXISTS (SELECT FROM claims WHERE priority = :priority_text)
   AND NOT EXISTS (SELECT FROM model_control
                   WHERE model = :model AND raised_at > clock_timestamp() - make_interval(secs => :patience))
""")


def run(services: Services) -> int:
    """Give starving classes a turn, at most once in `ageing_seconds` for each model. A setting of 0 switches it off."""
    patience = services.settings.ageing_seconds
    total = 0
    for model in services.catalogue if patience else ():
        with transaction(services.engine) as connection:
            starving = [
                priority
                for priority in (Priority.NORMAL, Priority.LOW)
                if connection.execute(
                    _STARVES,
                    {
                        "model": model,
                        "priority": priority.rank,
                        "priority_text": str(priority.rank),
                        "patience": patience,
                    },
                ).scalar_one()
            ]
            for priority in starving:
                total += lifecycle.raise_head(connection, model, priority, limit=_AT_A_TIME)
            if starving:
                now = {"raised_at": func.clock_timestamp()}
                statement = insert(ModelControl).values(model=model, **now)
                connection.execute(statement.on_conflict_do_update(index_elements=["model"], set_=now))
    return total
