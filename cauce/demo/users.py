"""The users: the contract that others import, and the service that owns it. Written as a team would write it."""

from cauce import Command, Domain, Event, Record, Rejected, Service

users = Domain("users", key="user_id")


class User(Record, domain=users):
    user_id: str
    name: str
    email: str


class UserRegistered(Event, domain=users):
    user_id: str
    name: str
    email: str


class RegisterUser(Command, domain=users):
    user_id: str
    name: str
    email: str


service = Service("users", owns=users)


@service.decide
def register(user: User | None, command: RegisterUser) -> UserRegistered:
    if user is not None:
        raise Rejected(f"user {command.user_id} is already registered")
    if "@" not in command.email:
        raise Rejected("that is no e-mail address")
    return UserRegistered(command.user_id, command.name, command.email)


@service.evolve
def registered(user: User | None, event: UserRegistered) -> User:
    return User(event.user_id, event.name, event.email)
