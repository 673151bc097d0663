package roomserver

import (
	"context"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// settling is a roomserver that builds due events upon everything that arrived before them.
type settling struct {
	expiration.Roomserver
	settled *settled
}

func (s *settling) Close(
	ctx context.Context, e expiration.Event, o expiration.Outcome, sent time.Time, lost bool,
	claim func(context.Context, expiration.SignedEvent) error,
) error {
	if err := s.wait(ctx, e.RoomID, o, sent); err != nil {
		return err
	}
	return s.Roomserver.Close(ctx, e, o, sent, lost, claim)
}

// Send implements expiration.Roomserver.
func (s *settling) Send(
	ctx context.Context, t expiration.Timer, o expiration.Outcome, claim func(context.Context, expiration.Built) error,
) (string, error) {
	if err := s.wait(ctx, t.Event.RoomID, o, t.Deadline); err != nil {
		return "", err
	}
	return s.Roomserver.Send(ctx, t, o, claim)
}

// wait waits for the room's queue. An event that is due waits for its turn; a request does not.
func (s *settling) wait(ctx context.Context, roomID string, o expiration.Outcome, deadline time.Time) error {
	if o == expiration.Ended {
		return s.settled.wait(ctx, roomID, callerSettles)
	}
	return s.settled.inTurn(ctx, roomID, deadline)
}
