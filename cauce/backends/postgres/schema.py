"""The steps by which the schema of a bus came about, as SQL that is read and run as it stands.

`{schema}` is the quoted name of the schema, `{lock}` the number of the lock of its writers. A step that was released is
never changed: append another one, number and all.

The log, in three words. **Turns**: whoever writes takes the lock, and adds one row here, in which the heads of the
three logs stand. Rows are added and never updated, because of a row that is updated a thousand times a second all
versions must be looked through as long as any transaction of the database, however idle, may still see the oldest.
**Presumed**: `take_turn` is told how the writer thinks that streams and claims stand, writes if that is so, and else
tells how they do stand. **Void**: a turn whose reply was lost is looked for, and made impossible where it is not found.
"""

from __future__ import annotations

from typing import NamedTuple

from cauce.backends.postgres.wire_tables import WIRE_TABLES

__all__ = ["STEPS", "Step"]


class Step(NamedTuple):
    """One step: its number counts on from the last, its name says what it makes."""

    number: int
    name: str
    sql: str


_ENTRIES = """
create table {schema}.%s (
    position bigint primary key,
    domain text collate "C" not null,
    key text collate "C" not null,
    version bigint not null,
    slot smallint not null,
    type text collate "C" not null,
    id text collate "C" not null,
    meta bytea not null,
    wish bytea,
    body bytea not null,
    digest bigint not null,
    unique (domain, key%s)
);
"""

_TABLES = (
    """
create table {schema}.turns (
    change bigint primary key,
    writer text collate "C" not null,
    turn bigint not null,
    facts bigint not null,
    commands bigint not null,
    records bigint not null,
    void boolean not null default false,
    at timestamptz not null default clock_timestamp(),
    unique (writer, turn)
);
-- Nothing was forgotten yet: from the beginning this is counted.
insert into {schema}.turns (change, writer, turn, facts, commands, records, void)
    values (0, 'forgotten', 0, 0, 0, 0, true);

-- log: 0 is facts, 1 commands, 2 records
create table {schema}.claims (
    log smallint,
    name text collate "C",
    owner text collate "C" not null,
    fence bigint not null,
    beat bigint not null,
    primary key (log, name)
);
"""
    + _ENTRIES % ("facts", ", version")
    + _ENTRIES % ("commands", ", version")
    + _ENTRIES % ("records", "")
    + """
-- An id may be longer than what an index shall hold of each.
create index facts_id on {schema}.facts (left(id, 36));
create index commands_id on {schema}.commands (left(id, 36));
"""
)

_INSERT = """
    if counts[%d] > 0 then
        insert into {schema}.%s (position, domain, key, version, slot, type, id, meta, wish, body, digest)
        select heads[%d] + e.at, e.domain, e.key, e.version, e.slot, e.type, e.id, e.meta, e.wish, e.body, e.digest
        from unnest(e_log, e_at, e_domain, e_key, e_version, e_slot, e_type, e_id, e_meta, e_wish, e_body, e_digest)
            as e (log, at, domain, key, version, slot, type, id, meta, wish, body, digest)
        where e.log = %d%s;
    end if;
"""

_MOVE = """
        on conflict (domain, key) do update set position = excluded.position, version = excluded.version,
            type = excluded.type, id = excluded.id, meta = excluded.meta, wish = excluded.wish, body = excluded.body,
            digest = excluded.digest"""

_TAKE_TURN = (
    """
-- s: how streams are presumed to stand. c: the same of claims; a beat below 0 says that only the fence matters. Where
-- nobody else took a turn since `seen`, what is sure need not be looked at. r: first ids that must not stand yet.
-- w: claims to write. e: entries to write, each at so many positions above the head; counts: so many the head rises.
create function {schema}.take_turn(
    seen bigint, by text, number bigint, doubt boolean,
    s_log smallint[], s_domain text[], s_key text[], s_version bigint[], s_sure boolean[],
    c_log smallint[], c_name text[], c_owner text[], c_fence bigint[], c_beat bigint[], c_sure boolean[],
    r_log smallint[], r_domain text[], r_key text[], r_id text[],
    w_log smallint[], w_name text[], w_owner text[], w_fence bigint[], w_beat bigint[],
    e_log smallint[], e_at bigint[], e_domain text[], e_key text[], e_version bigint[], e_slot smallint[],
    e_type text[], e_id text[], e_meta bytea[], e_wish bytea[], e_body bytea[], e_digest bigint[], counts bigint[],
    out well boolean, out latest bigint, out heads bigint[],
    out streams bigint[], out versions bigint[], out positions bigint[],
    out claims bigint[], out owners text[], out fences bigint[], out beats bigint[],
    out repeats bigint[], out places bigint[]
) language plpgsql set enable_seqscan = off set plan_cache_mode = force_generic_plan as $take_turn$
declare
    others boolean;
begin
    perform pg_advisory_xact_lock({lock});
    select t.change, array[t.facts, t.commands, t.records] into latest, heads
    from {schema}.turns t order by t.change desc limit 1;
    others := latest <> seen;
    if others or doubt then
        select array_agg(p.n), array_agg(coalesce(v.version, 0)), array_agg(coalesce(v.position, 0))
        into streams, versions, positions
        from unnest(s_log, s_domain, s_key, s_version, s_sure) with ordinality
            as p (log, domain, key, version, sure, n)
        left join lateral (
            (select f.version, f.position from {schema}.facts f
                where p.log = 0 and f.domain = p.domain and f.key = p.key order by f.version desc limit 1)
            union all
            (select f.version, f.position from {schema}.commands f
                where p.log = 1 and f.domain = p.domain and f.key = p.key order by f.version desc limit 1)
            union all
            (select f.version, f.position from {schema}.records f
                where p.log = 2 and f.domain = p.domain and f.key = p.key)
        ) v on true
        where (others or not p.sure) and coalesce(v.version, 0) <> p.version;
        select array_agg(p.n), array_agg(coalesce(k.owner, '')), array_agg(coalesce(k.fence, 0)),
            array_agg(coalesce(k.beat, 0))
        into claims, owners, fences, beats
        from unnest(c_log, c_name, c_owner, c_fence, c_beat, c_sure) with ordinality
            as p (log, name, owner, fence, beat, sure, n)
        left join lateral (select * from {schema}.claims c where c.log = p.log and c.name = p.name) k on true
        where (others or not p.sure) and (coalesce(k.fence, 0) <> p.fence
            or (p.beat >= 0 and (coalesce(k.beat, 0) <> p.beat or coalesce(k.owner, '') <> p.owner)));
    end if;
    if cardinality(r_log) > 0 then
        select array_agg(p.n), array_agg(v.position) into repeats, places
        from unnest(r_log, r_domain, r_key, r_id) with ordinality as p (log, domain, key, id, n)
        cross join lateral (
            select min(f.position) as position from {schema}.facts f
                where p.log = 0 and left(f.id, 36) = left(p.id, 36) and f.id = p.id
                and f.domain = p.domain and f.key = p.key
            union all
            select min(f.position) from {schema}.commands f
                where p.log = 1 and left(f.id, 36) = left(p.id, 36) and f.id = p.id
                and f.domain = p.domain and f.key = p.key
        ) v where v.position is not null;
    end if;
    well := streams is null and claims is null and repeats is null;
    if not well or (cardinality(w_log) = 0 and cardinality(e_log) = 0) then
        return;
    end if;
"""
    + _INSERT % (1, "facts", 1, 0, "")
    + _INSERT % (2, "commands", 2, 1, "")
    + _INSERT % (3, "records", 3, 2, _MOVE)
    + """
    if cardinality(w_log) > 0 then
        insert into {schema}.claims as k (log, name, owner, fence, beat)
        select * from unnest(w_log, w_name, w_owner, w_fence, w_beat)
        on conflict (log, name) do update set owner = excluded.owner, fence = excluded.fence, beat = excluded.beat;
    end if;
    insert into {schema}.turns (change, writer, turn, facts, commands, records)
    values (latest + 1, by, number, heads[1] + counts[1], heads[2] + counts[2], heads[3] + counts[3]);
end
$take_turn$;

-- Whether a turn stands whose reply was lost, and after which heads. If it does not stand it never will.
create function {schema}.settle_turn(
    by text, number bigint, out stands boolean, out latest bigint, out heads bigint[]
) language plpgsql set enable_seqscan = off as $settle_turn$
begin
    perform pg_advisory_xact_lock({lock});
    select not t.void, t.change, array[t.facts, t.commands, t.records] into stands, latest, heads
    from {schema}.turns t where t.writer = by and t.turn = number;
    if not found then
        stands := false;
        insert into {schema}.turns (change, writer, turn, facts, commands, records, void)
        select t.change + 1, by, number, t.facts, t.commands, t.records, true
        from {schema}.turns t order by t.change desc limit 1
        returning change into latest;
    end if;
end
$settle_turn$;
"""
)

STEPS: tuple[Step, ...] = (Step(1, "the three logs", _TABLES + _TAKE_TURN), Step(2, "the wire", WIRE_TABLES))
"""All steps, oldest first. The number of the last is the format that this code knows."""
