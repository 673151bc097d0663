package roomserver

import (
	"bytes"
	"context"
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
	if err = res.Err(); err != nil {
		return &expiration.NotTakenError{Cause: err}
	}
	return nil
}
