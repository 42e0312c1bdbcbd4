"""The users: the contract, importable by anyone, and the service that owns it."""

from cauce import Command, Domain, Event, Record, Rejected, Service, replace

users = Domain("users", key="user_id")


class User(Record, domain=users):
    user_id: str
    name: str
    email: str
    address: str = ""


class UserRegistered(Event, domain=users):
    user_id: str
    name: str
    email: str


class EmailChanged(Event, domain=users):
    user_id: str
    email: str


class RegisterUser(Command, domain=users):
    user_id: str
    name: str
    email: str


class ChangeEmail(Command, domain=users):
    user_id: str
    email: str


service = Service("users", owns=users)


@service.decide
def register(user: User | None, command: RegisterUser) -> UserRegistered:
    if user is not None:
        raise Rejected("already registered")
    return UserRegistered(command.user_id, command.name, command.email)


@service.decide
def change_email(user: User | None, command: ChangeEmail) -> EmailChanged | None:
    if user is None:
        raise Rejected("no such user")
    return None if user.email == command.email else EmailChanged(command.user_id, command.email)


@service.evolve
def registered(user: User | None, event: UserRegistered) -> User:
    return User(event.user_id, event.name, event.email)


@service.evolve
def email_changed(user: User, event: EmailChanged) -> User:
    return replace(user, email=event.email)
