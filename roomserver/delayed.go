package roomserver

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Send implements expiration.Roomserver. It sends the event the way a client's event is sent. Dendrite checks now whether the sender may
// send it, not when the event is scheduled.
func (out *Outbox) Send(
	ctx context.Context, t expiration.Timer, o expiration.Outcome, claim func(context.Context, expiration.Built) error,
) (string, error) {
	var sent expiration.SignedEvent
	s := &oneSend{ClientRoomserverAPI: out.rsAPI}
	s.hook = &expiration.Hook{Before: func(ctx context.Context, b expiration.Built) error {
		sent = b.Signed()
		return claim(ctx, b)
	}}
	e, content := t.Event, t.Delayed.Content
	if t.Delayed.Expires > 0 {
		var err error
		if content, err = runningContent(content); err != nil {
			return "", &expiration.UnsendableError{Cause: err}
		}
		// The ground hides the current state from Dendrite until the event is built. Otherwise Dendrite would not send state that the room
		// already has, and the event would not run anew.
		s.ground = newGround(e)
	}
	res, err := out.sendEvent(ctx, s, e, content, t.Delayed.Timestamp)
	if err != nil {
		return "", err
	}
	switch {
	case res.Code != http.StatusOK:
		// A refusal is returned unchanged, because checkRoom could turn it into a drop. After a request to send, the event stays scheduled:
		// its sender may rejoin.
		if err = s.verdict(res); s.hook.Called || errors.As(err, new(*expiration.RefusedError)) {
			return "", err
		}
		return "", out.checkRoom(ctx, e, err)
	case s.hook.Called:
		return sent.EventID, out.entered(ctx, e, sent, o == expiration.Ended)
	}
	body, err := json.Marshal(res.JSON)
	return gjson.GetBytes(body, "event_id").Str, err
}
