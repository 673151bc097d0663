package clientapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/matrix-org/dendrite/clientapi/routing"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/syncapi/synctypes"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// sendTimeout is how long the send of an expiring event may take.
const sendTimeout = time.Minute

// Sender is what a send needs of the engine: it begins the timers of expiring events, and has the locks that order sends and closings.
type Sender interface {
	LockState(ctx context.Context, s expiration.StateKey) (unlock func(), err error)
	LockRequest(ctx context.Context, request expiration.RequestHash) (unlock func(), err error)
	Sent(ctx context.Context, request expiration.RequestHash) (eventID string, err error)
	Begin(ctx context.Context, e expiration.Event, duration time.Duration, service bool) (*expiration.Pending, error)
	Restart(ctx context.Context, eventID string, duration time.Duration) error
	Running(eventID, sender string) bool
	Token(eventID string) string
}

// target is the room, type and state key of an event that a request sends.
type target struct {
	roomID, eventType string
	txnID, stateKey   *string
	// delayed: the request schedules the event, and does not send it now.
	delayed bool
}

// sentEvent is Dendrite's answer to a send.
type sentEvent struct {
	EventID string `json:"event_id"`
}

// sentExpiringEvent is the answer to the send of an expiring event.
type sentExpiringEvent struct {
	sentEvent
	// DraftEventID repeats the ID under the key of the draft's example.
	DraftEventID string `json:"eventId"`
	Token        string `json:"expire_refresh_token"`
}

// send sends an event, expiring or not, or schedules it if the query has a delay. State is sent under the lock of its state key, so that no
// closing event is built meanwhile. The lock is taken after the whole request has arrived, so that a slow client does not hold it.
func (a *API) send(req *http.Request, device *userapi.Device, to target) util.JSONResponse {
	if isDelayed(req) {
		return a.scheduleByQuery(req, device, to)
	}
	body, readErr := io.ReadAll(req.Body)
	content, duration, err := parseContent(body, a.cfg.MaxDuration)
	if err == nil && readErr == nil {
		err = checkContent(body)
	}
	if err == nil && readErr == nil && duration > 0 {
		var leave func()
		if leave, err = a.place(req, device); err == nil {
			defer leave()
			err = a.checkExpiring(req.Context(), device, to, content)
		}
	}
	if err != nil && readErr == nil {
		return errorResponse(req, err)
	}
	if to.stateKey != nil {
		unlock, err := a.timers.LockState(req.Context(), a.stateKey(req.Context(), to))
		if err != nil {
			return errorResponse(req, err)
		}
		defer unlock()
	}
	var res util.JSONResponse
	if readErr != nil || duration == 0 {
		req.Body = readAlready(body, readErr)
		res = a.dendriteSend(req, device, to, a.rsAPI)
	} else {
		res = a.sendExpiring(req, device, to, content, duration)
	}
	failpoint.Pass(failpoint.BeforeAnswer)
	return res
}

func (a *API) sendExpiring(
	req *http.Request, device *userapi.Device, to target, content []byte, duration time.Duration,
) util.JSONResponse {
	// The send goes on even if the client hangs up. The client will repeat the request, and must then get the same event.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(req.Context()), sendTimeout)
	defer cancel()
	req = req.WithContext(ctx)
	request := requestHash(device, to)
	if request != nil {
		unlock, err := a.timers.LockRequest(ctx, *request)
		if err != nil {
			return errorResponse(req, err)
		}
		defer unlock()
		eventID, err := a.timers.Sent(ctx, *request)
		switch {
		case err != nil:
			return errorResponse(req, err)
		case eventID != "":
			return a.sent(eventID)
		}
	}
	var pending *expiration.Pending
	hook := &expiration.Hook{
		Before: func(ctx context.Context, b expiration.Built) (err error) {
			if !b.Closable {
				return expiration.ErrTooLarge
			}
			e := expiration.Event{ID: b.EventID, RoomID: b.RoomID, Type: b.Type, StateKey: b.StateKey, Sender: device.UserID}
			if request != nil {
				e.Request = &expiration.Request{Hash: *request, Signed: b.Signed()}
			}
			pending, err = a.timers.Begin(ctx, e, duration, device.AccountType == userapi.AccountTypeAppService)
			return err
		},
		After: func(_ context.Context, sent bool) { pending.Activate(sent) },
	}
	hooked, hookedAPI := a.rsAPI.Hooked(req, hook)
	rsAPI := &restartableState{ClientRoomserverAPI: hookedAPI, running: a.timers.Running, userID: device.UserID}
	for range 2 {
		hooked.Body = io.NopCloser(bytes.NewReader(content))
		res := a.dendriteSend(hooked, device, to, rsAPI)
		if hook.Err != nil {
			return errorResponse(req, hook.Err)
		}
		if res.Code != http.StatusOK {
			return res
		}
		eventID, err := sentEventID(res)
		if err != nil {
			return errorResponse(req, err)
		}
		if !hook.Called && to.stateKey != nil {
			// Dendrite sent nothing: the current state has the same content, and its timer was running a moment ago.
			err = a.timers.Restart(ctx, eventID, duration)
			if errors.Is(err, expiration.ErrNotFound) {
				continue // the timer has ended, so restartableState now hides that state, and Dendrite sends a new event
			}
			if err != nil {
				return errorResponse(req, err)
			}
		}
		// A message that was not sent now was sent by an earlier request with this transaction ID.
		return a.sent(eventID)
	}
	return errorResponse(req, errors.New("the timer of an event that is sent again can neither be found nor replaced"))
}

// sent is the answer to the send of an expiring event, by this request or an earlier one.
func (a *API) sent(eventID string) util.JSONResponse {
	return util.JSONResponse{Code: http.StatusOK, JSON: sentExpiringEvent{
		sentEvent: sentEvent{eventID}, DraftEventID: eventID, Token: a.timers.Token(eventID),
	}}
}

// requestHash identifies a request by its transaction ID and the scope of that ID. It is nil without a transaction ID. The hash is stored,
// so a repeated request is recognised after a crash. Dendrite's own cache of transactions is lost with the process.
func requestHash(device *userapi.Device, to target) *expiration.RequestHash {
	if to.txnID == nil {
		return nil
	}
	hash := sha256.New()
	parts := []string{device.UserID, device.ID, to.roomID, to.eventType, *to.txnID}
	if to.delayed {
		parts = append(parts, "delayed")
	}
	for _, part := range parts {
		_, _ = fmt.Fprintf(hash, "%d:%s", len(part), part)
	}
	return (*expiration.RequestHash)(hash.Sum(nil))
}

// dendriteSend calls Dendrite's SendEvent under the lock of the sender in the room.
func (a *API) dendriteSend(
	req *http.Request, device *userapi.Device, to target, rsAPI api.ClientRoomserverAPI,
) util.JSONResponse {
	unlock, err := a.rsAPI.LockSender(req.Context(), to.roomID, device.UserID)
	if err != nil {
		return errorResponse(req, fmt.Errorf("waiting for another event of the sender: %w", err))
	}
	defer unlock()
	return routing.SendEvent(
		req, device, to.roomID, to.eventType, to.txnID, to.stateKey, a.dendrite, rsAPI, a.transactions,
	)
}

// stateKey returns the state that a request will set. In rooms with pseudo IDs, a user ID as the state key stands for that user's key, and
// Dendrite translates it when it builds the event. If a lookup fails here, it fails in Dendrite too, and Dendrite refuses the event.
func (a *API) stateKey(ctx context.Context, to target) expiration.StateKey {
	s := expiration.StateKey{RoomID: to.roomID, Type: to.eventType, Key: *to.stateKey}
	version, err := a.rsAPI.QueryRoomVersionForRoom(ctx, to.roomID)
	if err != nil || version != gomatrixserverlib.RoomVersionPseudoIDs {
		return s
	}
	roomID, err := spec.NewRoomID(to.roomID)
	if err != nil {
		return s
	}
	translated, err := synctypes.FromClientStateKey(*roomID, *to.stateKey,
		func(roomID spec.RoomID, userID spec.UserID) (*spec.SenderID, error) {
			return a.rsAPI.QuerySenderIDForUser(ctx, roomID, userID)
		})
	if err == nil && translated != nil {
		s.Key = *translated
	}
	return s
}

// givenStateKey undoes what stateKey does: it returns the state key of an event as a client gives it. If a lookup fails, that is the key in
// the room.
func (a *API) givenStateKey(ctx context.Context, e expiration.Event) *string {
	if e.StateKey == nil {
		return nil
	}
	version, err := a.rsAPI.QueryRoomVersionForRoom(ctx, e.RoomID)
	if err != nil || version != gomatrixserverlib.RoomVersionPseudoIDs {
		return e.StateKey
	}
	roomID, err := spec.NewRoomID(e.RoomID)
	if err != nil {
		return e.StateKey
	}
	userID, err := a.rsAPI.QueryUserIDForSender(ctx, *roomID, spec.SenderID(*e.StateKey))
	if err != nil || userID == nil { // no user's key
		return e.StateKey
	}
	key := userID.String()
	return &key
}

// restartableState hides current state from Dendrite, except for events with a running timer of the same sender. If a new event has the
// content of the current state, Dendrite answers with the ID of the current event, and does not check the sender's permission. If that
// event had no timer, there would be none to restart. If it were another user's, the answer would contain that user's token.
type restartableState struct {
	api.ClientRoomserverAPI
	running func(eventID, sender string) bool
	userID  string
}

// QueryCurrentState implements api.QueryEventsAPI.
func (r *restartableState) QueryCurrentState(
	ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse,
) error {
	if err := r.ClientRoomserverAPI.QueryCurrentState(ctx, req, res); err != nil {
		return err
	}
	for tuple, e := range res.StateEvents {
		if !r.running(e.EventID(), r.userID) {
			delete(res.StateEvents, tuple)
		}
	}
	return nil
}

// sentEventID reads the event ID from Dendrite's answer, whose type is not exported.
func sentEventID(res util.JSONResponse) (string, error) {
	data, err := json.Marshal(res.JSON)
	if err != nil {
		return "", err
	}
	var sent sentEvent
	if err = json.Unmarshal(data, &sent); err == nil && sent.EventID == "" {
		err = errors.New("the answer to a send has no event ID")
	}
	return sent.EventID, err
}

// readAlready returns a body that yields the bytes in body and then err, or the end of the body if err is nil.
func readAlready(body []byte, err error) io.ReadCloser {
	if err == nil {
		return io.NopCloser(bytes.NewReader(body))
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(body), errorReader{err}))
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }
