package roomserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Close implements expiration.Roomserver. It sends the closing event the way a client's event is sent. So Dendrite takes care of power
// levels, pseudo IDs and room versions.
func (out *Outbox) Close(
	ctx context.Context, e expiration.Event, o expiration.Outcome, sent time.Time, lost bool,
	claim func(context.Context, expiration.SignedEvent) error,
) error {
	original, err := out.original(ctx, e)
	if err != nil {
		return out.checkRoom(ctx, e, err)
	}
	content, err := closingContent(original.Content(), e.ID, o)
	if err != nil {
		return fmt.Errorf("making the content of a closing event: %w", err)
	}
	return out.send(ctx, e, o, original, content, later(sent, original), lost, claim)
}

// later returns the timestamp of a closing event: the later of the argument sent and the time just after the original's timestamp. When
// another branch of the event graph has the original, state resolution prefers the later of the two. The original can bear any timestamp: a
// client may choose it, and the clock may have been set back since. The latest possible time is not exceeded.
func later(sent time.Time, original gomatrixserverlib.PDU) time.Time {
	after := min(original.OriginServerTS()+1, dendritefix.MaxTimestamp).Time()
	if sent.Before(after) {
		return after
	}
	return sent
}

func (out *Outbox) send(
	ctx context.Context, e expiration.Event, o expiration.Outcome, original gomatrixserverlib.PDU, content []byte, sent time.Time, lost bool,
	claim func(context.Context, expiration.SignedEvent) error,
) error {
	var closing expiration.SignedEvent
	claiming := false
	s := &oneSend{ClientRoomserverAPI: out.rsAPI, ground: newGround(e)}
	s.hook = &expiration.Hook{Before: func(ctx context.Context, b expiration.Built) error {
		if err := out.checkGround(ctx, e, original, s.ground); err != nil && !(lost && errors.Is(err, expiration.ErrSetBack)) {
			return err
		}
		claiming, closing = true, b.Signed()
		return claim(ctx, closing)
	}}
	res, err := out.sendEvent(ctx, s, e, content, sent)
	if err != nil {
		return err
	}
	if res.Code == http.StatusOK {
		return out.entered(ctx, e, closing, o == expiration.Ended)
	}
	err = s.verdict(res)
	if claiming {
		return err
	}
	if refused := (*expiration.RefusedError)(nil); errors.As(err, &refused) {
		// A room that was set back may lack the state that allows the closing event. That state comes back together with the original.
		if s.ground != nil && s.ground.asked && !lost && errors.Is(out.checkGround(ctx, e, original, s.ground), expiration.ErrSetBack) {
			return out.checkRoom(ctx, e, expiration.ErrSetBack)
		}
		reason := expiration.Forbidden
		if refused.Code == http.StatusNotFound {
			reason = expiration.RoomGone
		}
		err = &expiration.DropError{Reason: reason, Cause: err}
	}
	return out.checkRoom(ctx, e, err)
}

// checkGround returns an error if the closing event of e must not be sent. In the state that the closing event is built upon, e must still
// be in its place and not be redacted.
func (out *Outbox) checkGround(ctx context.Context, e expiration.Event, original gomatrixserverlib.PDU, g *ground) error {
	switch {
	case g == nil: // not state
		_, err := out.original(ctx, e)
		return err
	case g.current == nil:
		return expiration.ErrSetBack
	case g.current.EventID() != e.ID && !newer(g.current, original):
		return expiration.ErrSetBack
	case g.current.EventID() != e.ID:
		return &expiration.DropError{Reason: expiration.Replaced}
	case !isRunning(g.current):
		return &expiration.DropError{Reason: expiration.Redacted}
	}
	return nil
}

// newer reports whether the current state replaced original. It did if it was built upon original, or if the two crossed and state
// resolution preferred the later one.
//
// Otherwise the room's state was set back. Dendrite removes an event, with all state that it set, from the forward extremities as soon as
// another event refers to it. It does so even if a crash has left that other event in the queue. An event that is sent in the meantime
// becomes the only forward extremity. When the roomserver has processed the queued event, the original is current again.
func newer(current, original gomatrixserverlib.PDU) bool {
	return current.Depth() > original.Depth() || current.OriginServerTS() > original.OriginServerTS()
}
