"""The members: what they look like today, how what was stored before is lifted to that, and the service that owns them.

2017, version 1: `MemberSignedUp(member_id, name, mail)`. Version 2 called the field `email`. Version 3 called the event
`MemberJoined` and split the name. Version 4 knows in which branch. `schema/` holds bodies of each of them.
"""

from typing import Any

from cauce import Command, Domain, Event, Record, Rejected, Service, replace, upcast

members = Domain("members", key="member_id")


class Member(Record, domain=members, version=2):
    member_id: str
    first: str
    last: str
    email: str
    branch: str


class MemberJoined(Event, domain=members, version=4, was=("MemberSignedUp",)):
    member_id: str
    first: str
    last: str
    email: str
    branch: str


class EmailChanged(Event, domain=members):
    member_id: str
    email: str


class Join(Command, domain=members, version=2):
    member_id: str
    first: str
    last: str
    email: str
    branch: str = "central"


@upcast(MemberJoined, from_version=1)
def mail_is_email(body: dict[str, Any]) -> dict[str, Any]:
    body["email"] = body.pop("mail")
    return body


@upcast(MemberJoined, from_version=2)
def two_names(body: dict[str, Any]) -> dict[str, Any]:
    body["first"], _, body["last"] = body.pop("name").partition(" ")
    return body


@upcast(MemberJoined, from_version=3)
def the_only_branch(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"branch": "central"}


@upcast(Member, from_version=1)
@upcast(Join, from_version=1)
def all_at_once(body: dict[str, Any]) -> dict[str, Any]:
    return the_only_branch(two_names(mail_is_email(body)))


service = Service("members", owns=members)


@service.decide
def join(member: Member | None, command: Join) -> MemberJoined:
    if member is not None:
        raise Rejected("is a member already")
    return MemberJoined(command.member_id, command.first, command.last, command.email, command.branch)


@service.evolve
def joined(member: Member | None, event: MemberJoined) -> Member:
    return Member(event.member_id, event.first, event.last, event.email, event.branch)


@service.evolve
def email_changed(member: Member, event: EmailChanged) -> Member:
    return replace(member, email=event.email)
