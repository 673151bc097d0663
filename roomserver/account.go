package roomserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Accounts knows the accounts of this server.
type Accounts interface {
	// Deactivated reports whether an account is deactivated, or about to be. An account that does not exist is not.
	Deactivated(ctx context.Context, userID string) (bool, error)
}

// Guard is a Closer that looks at the sender of a delayed event before it sends the event. Who scheduled it was logged in and in
// the room; both can have changed since, and the roomserver checks neither: a join of a public room needs no membership, and no
// event needs an account.
//
// Closing events are not concerned: they are the homeserver's word about an event that is in the room.
type Guard struct {
	*Closer
	accounts Accounts
}

var _ expiration.Roomserver = (*Guard)(nil)

// NewGuard returns a sender that asks the accounts before it sends a delayed event.
func NewGuard(closer *Closer, accounts Accounts) *Guard {
	return &Guard{Closer: closer, accounts: accounts}
}

// errNotJoined answers a user who is out of the room and has a membership event sent there.
var errNotJoined = json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"The sender is no longer in the room"}`)

// Send implements expiration.Roomserver. The error is a *expiration.DropError if the account is deactivated.
func (g *Guard) Send(
	ctx context.Context, t expiration.Timer, o expiration.Outcome, claim func(context.Context, expiration.Built) error,
) (string, error) {
	if err := g.checkAccount(ctx, t.Event); err != nil {
		return "", err
	}
	return g.Closer.Send(ctx, t, o, func(ctx context.Context, b expiration.Built) error {
		if err := g.checkMember(ctx, t.Event); err != nil {
			return err
		}
		return claim(ctx, b)
	})
}

// Resubmit implements expiration.Roomserver. What the roomserver has was sent before the account was deactivated.
func (g *Guard) Resubmit(ctx context.Context, t expiration.Timer, signed expiration.SignedEvent) error {
	if t.Delayed != nil {
		if err := g.checkAccount(ctx, t.Event); err != nil {
			if known, lookErr := g.event(ctx, t.Event.RoomID, signed.EventID); lookErr != nil || known == nil {
				return err
			}
		}
	}
	return g.Closer.Resubmit(ctx, t, signed)
}

// checkAccount returns a *expiration.DropError if the sender's account is deactivated.
func (g *Guard) checkAccount(ctx context.Context, e expiration.Event) error {
	deactivated, err := g.accounts.Deactivated(ctx, e.Sender)
	switch {
	case err != nil:
		return fmt.Errorf("looking up the sender's account: %w", err)
	case deactivated:
		return &expiration.DropError{Reason: expiration.Deactivated}
	}
	return nil
}

// checkMember returns a *expiration.RefusedError if a membership event's sender is not joined. The sender was when it was
// scheduled, and the auth rules would let a user who is out come back by it, or knock.
func (g *Guard) checkMember(ctx context.Context, e expiration.Event) error {
	if e.Type != spec.MRoomMember {
		return nil
	}
	err := g.checkSender(ctx, e)
	if dropped := (*expiration.DropError)(nil); errors.As(err, &dropped) && dropped.Reason == expiration.SenderGone {
		return &expiration.RefusedError{Code: http.StatusForbidden, Response: errNotJoined}
	}
	return err
}
