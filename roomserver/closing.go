package roomserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/matrix-org/dendrite/clientapi/routing"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
)

// Outbox sends closing and delayed events. It implements expiration.Roomserver.
type Outbox struct {
	cfg   *config.ClientAPI
	rsAPI *API
}

var _ expiration.Roomserver = (*Outbox)(nil)

// NewOutbox returns a sender of closing and delayed events. They pass through the wrapper, like all others.
func NewOutbox(cfg *config.ClientAPI, rsAPI *API) *Outbox {
	return &Outbox{cfg: cfg, rsAPI: rsAPI}
}

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

// sendEvent sends an event with the room, type, state key and sender of e, the way a client of the sender does. The time sent is passed as
// an application service passes it, in the parameter ts. The zero time means now.
func (out *Outbox) sendEvent(
	ctx context.Context, s *oneSend, e expiration.Event, content []byte, sent time.Time,
) (util.JSONResponse, error) {
	target := "/"
	if !sent.IsZero() {
		target += "?ts=" + strconv.FormatInt(sent.UnixMilli(), 10)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, target, bytes.NewReader(content))
	if err != nil {
		return util.JSONResponse{}, err
	}
	unlock, err := out.rsAPI.LockSender(ctx, e.RoomID, e.Sender)
	if err != nil {
		return util.JSONResponse{}, fmt.Errorf("waiting for another event of the sender: %w", err)
	}
	defer unlock()
	device := &userapi.Device{UserID: e.Sender}
	return routing.SendEvent(s.quiet(req), device, e.RoomID, e.Type, nil, e.StateKey, out.cfg, s, nil), nil
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

// Wake implements expiration.Roomserver. Dendrite ends a room's worker after a minute without events. Then nothing reads the room's queue
// until the next event arrives, not even the messages that JetStream redelivers.
func (out *Outbox) Wake(ctx context.Context, roomID string) error {
	return inputqueue.Wake(ctx, out.rsAPI, out.cfg.Matrix.ServerName, roomID)
}

// input gives an event of this server to the roomserver, for the first time or again.
func (out *Outbox) input(ctx context.Context, e expiration.Event, pdu gomatrixserverlib.PDU) error {
	sender, err := spec.NewUserID(e.Sender, true)
	if err != nil {
		return err
	}
	var res api.InputRoomEventsResponse
	out.rsAPI.InputRoomEvents(ctx, &api.InputRoomEventsRequest{InputRoomEvents: []api.InputRoomEvent{{
		Kind: api.KindNew, Event: &types.HeaderedEvent{PDU: pdu}, Origin: sender.Domain(), SendAsServer: string(sender.Domain()),
	}}, VirtualHost: sender.Domain()}, &res)
	if rejected(&res) {
		return &expiration.UnsendableError{Cause: res.Err()}
	}
	return res.Err()
}

// Replaced implements expiration.Roomserver.
func (out *Outbox) Replaced(ctx context.Context, e expiration.Event) (bool, error) {
	current, err := out.replaced(ctx, e)
	return current != nil, err
}

// replaced returns the current state if it has replaced the state event e, and otherwise nil.
func (out *Outbox) replaced(ctx context.Context, e expiration.Event) (gomatrixserverlib.PDU, error) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: e.Type, StateKey: *e.StateKey}
	var res api.QueryCurrentStateResponse
	if err := out.rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: e.RoomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &res); err != nil {
		return nil, fmt.Errorf("looking up the current state: %w", err)
	}
	current := res.StateEvents[tuple]
	if current == nil || current.EventID() == e.ID {
		return nil, nil
	}
	// An event that the roomserver does not know yet may be in its queue, and may still become the current state.
	original, err := out.event(ctx, e.RoomID, e.ID)
	if err != nil || original == nil || !newer(current, original) {
		return nil, err
	}
	return current.PDU, nil
}

// original returns the event that is to be closed, or an *expiration.DropError if it was redacted.
func (out *Outbox) original(ctx context.Context, e expiration.Event) (gomatrixserverlib.PDU, error) {
	original, err := out.event(ctx, e.RoomID, e.ID)
	switch {
	case err != nil:
		return nil, err
	case original == nil:
		return nil, expiration.ErrUnknownEvent
	case !isRunning(original):
		return nil, &expiration.DropError{Reason: expiration.Redacted}
	}
	return original, nil
}

// checkSender returns a *expiration.DropError if the room is gone or the sender is not joined.
func (out *Outbox) checkSender(ctx context.Context, e expiration.Event) error {
	sender, err := spec.NewUserID(e.Sender, true)
	if err != nil {
		return err
	}
	var res api.QueryMembershipForUserResponse
	if err = out.rsAPI.QueryMembershipForUser(ctx, &api.QueryMembershipForUserRequest{
		RoomID: e.RoomID, UserID: *sender,
	}, &res); err != nil {
		return fmt.Errorf("looking up the membership of the sender: %w", err)
	}
	switch {
	case !res.RoomExists:
		return &expiration.DropError{Reason: expiration.RoomGone}
	case !res.IsInRoom:
		return &expiration.DropError{Reason: expiration.SenderGone}
	}
	return nil
}

// checkRoom returns a *expiration.DropError if an operation failed because the room or the sender is gone. Otherwise it returns the
// operation's own error.
func (out *Outbox) checkRoom(ctx context.Context, e expiration.Event, failed error) error {
	if err := out.checkSender(ctx, e); err != nil {
		return err
	}
	return failed
}

// event returns an event that the roomserver has, or nil.
func (out *Outbox) event(ctx context.Context, roomID, eventID string) (gomatrixserverlib.PDU, error) {
	var res api.QueryEventsByIDResponse
	if err := out.rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{
		RoomID: roomID, EventIDs: []string{eventID},
	}, &res); err != nil {
		return nil, fmt.Errorf("looking up %s: %w", eventID, err)
	}
	if len(res.Events) == 0 {
		return nil, nil
	}
	return res.Events[0].PDU, nil
}
