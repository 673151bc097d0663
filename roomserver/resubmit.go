package roomserver

import (
	"context"
	"fmt"

	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Confirm implements expiration.Roomserver. It gives the event to the roomserver again, because the roomserver stores an event before it
// sends it. If the process died in between, the event is known, perhaps even as the current state, but no client was told of it. JetStream
// redelivers it only after minutes. If the roomserver had finished the event, the repetition is harmless; otherwise it finishes the event.
func (out *Outbox) Confirm(ctx context.Context, e expiration.Event) error {
	if err := out.checkSender(ctx, e); err != nil {
		return err
	}
	original, err := out.event(ctx, e.RoomID, e.ID)
	switch {
	case err != nil:
		return err
	case original == nil:
		return expiration.ErrUnknownEvent
	case !isRunning(original): // redacted, so it was sent
		return nil
	}
	return out.input(ctx, e, original)
}

// Resubmit implements expiration.Roomserver.
func (out *Outbox) Resubmit(ctx context.Context, t expiration.Timer, signed expiration.SignedEvent) error {
	e := t.Event
	if t.Delayed == nil && signed.EventID != e.ID {
		if err := out.checkOriginal(ctx, e, signed); err != nil {
			return err
		}
	}
	if err := out.checkSender(ctx, e); err != nil {
		// A delayed event that the roomserver already has was sent before its sender left.
		if known, lookErr := out.event(ctx, e.RoomID, signed.EventID); t.Delayed == nil || lookErr != nil || known == nil {
			return err
		}
	}
	pdu, err := readBuilt(signed)
	if err != nil {
		return err
	}
	if err = out.input(ctx, e, pdu); err != nil {
		return err
	}
	return out.entered(ctx, e, signed, false)
}

// checkOriginal returns a *expiration.DropError if the closing event of e is void, because e was replaced or redacted after the closing
// event was built. After a redaction, a closing event that the roomserver already has is still finished: it may be in its room.
func (out *Outbox) checkOriginal(ctx context.Context, e expiration.Event, closing expiration.SignedEvent) error {
	if e.StateKey != nil {
		current, err := out.replaced(ctx, e)
		switch {
		case err != nil:
			return out.checkRoom(ctx, e, err)
		case current != nil && current.EventID() != closing.EventID:
			return &expiration.DropError{Reason: expiration.Replaced}
		}
	}
	original, err := out.event(ctx, e.RoomID, e.ID)
	if err != nil || original == nil || isRunning(original) {
		return err
	}
	known, err := out.event(ctx, e.RoomID, closing.EventID)
	if err != nil || known != nil {
		return err
	}
	return &expiration.DropError{Reason: expiration.Redacted}
}

// readBuilt reads an event that was built earlier.
func readBuilt(signed expiration.SignedEvent) (gomatrixserverlib.PDU, error) {
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersion(signed.RoomVersion))
	if err == nil {
		var pdu gomatrixserverlib.PDU
		if pdu, err = version.NewEventFromTrustedJSON(signed.PDU, false); err == nil {
			return pdu, nil
		}
	}
	return nil, &expiration.UnsendableError{Cause: fmt.Errorf("reading %s, which was built earlier: %w", signed.EventID, err)}
}
