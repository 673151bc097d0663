package clientapi

import (
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"slices"

	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	// maxPageSize is the size at which a page of the list of delayed events ends, in bytes as the clients sent them. The last event of a
	// page may exceed it. In JSON, one of these bytes may take six.
	maxPageSize = 256 << 10
	// delayedEventSize is about the size of an event in the list without the parts that the client chose, in bytes.
	delayedEventSize = 512
)

// Finder finds the delayed events of a user.
type Finder interface {
	DelayedEvents(ctx context.Context, owner, after string) iter.Seq2[expiration.DelayedEvent, error]
	DelayedEvent(ctx context.Context, delayID, owner string) (expiration.DelayedEvent, error)
}

// delayedEvent is a delayed event as its owner sees it. OldDelay, RunningSince and the embedded result are for older clients, on the
// unstable paths.
type delayedEvent struct {
	DelayID      string          `json:"delay_id"`
	RoomID       string          `json:"room_id"`
	Type         string          `json:"type"`
	StateKey     *string         `json:"state_key,omitempty"`
	Content      json.RawMessage `json:"content"`
	Delay        int64           `json:"delay_ms"`
	DelayedSince int64           `json:"delayed_since_ts"`
	Finalised    *result         `json:"finalised,omitempty"`
	OldDelay     int64           `json:"delay,omitempty"`
	RunningSince int64           `json:"running_since,omitempty"`
	*result
}

// result is what became of a delayed event. A cancelled one has neither EventID nor Error.
type result struct {
	At      int64           `json:"finalised_ts"`
	EventID string          `json:"event_id,omitempty"`
	Error   json.RawMessage `json:"error,omitempty"`
}

func (a *API) newDelayedEvent(ctx context.Context, e expiration.DelayedEvent, d dialect) delayedEvent {
	shown := delayedEvent{
		DelayID: e.DelayID, RoomID: e.Timer.Event.RoomID, Type: e.Timer.Event.Type, StateKey: a.givenStateKey(ctx, e.Timer.Event),
		Content: e.Timer.Delayed.Content, Delay: e.Timer.Duration.Milliseconds(), DelayedSince: e.DelayedSince().UnixMilli(),
	}
	if e.Final != nil {
		shown.Finalised = &result{e.Final.At.UnixMilli(), e.Final.EventID, e.Final.Error}
	}
	if d == unstable {
		shown.OldDelay, shown.RunningSince, shown.result = shown.Delay, shown.DelayedSince, shown.Finalised
	}
	return shown
}

// list answers with one page of the user's scheduled events. There is no list of finalised events. The merged text of MSC4140 has no list
// at all, so there is one only on the unstable path.
func (a *API) list(req *http.Request, device *userapi.Device) util.JSONResponse {
	leave, err := a.enter(req, device, a.users)
	if err != nil {
		return errorResponse(req, err)
	}
	defer leave()
	page := struct {
		Events    []delayedEvent `json:"delayed_events"`
		NextBatch string         `json:"next_batch,omitempty"`
	}{Events: []delayedEvent{}}
	size, last, query := 0, "", req.URL.Query()
	if query.Get("status") == "finalised" {
		return util.JSONResponse{Code: http.StatusOK, JSON: page}
	}
	for e, err := range a.timers.DelayedEvents(req.Context(), device.UserID, query.Get("from")) {
		if err != nil {
			return errorResponse(req, err)
		}
		if size >= maxPageSize {
			page.NextBatch = last
			break
		}
		if query.Has("delay_id") && !slices.Contains(query["delay_id"], e.DelayID) {
			continue
		}
		shown := a.newDelayedEvent(req.Context(), e, unstable)
		size += len(shown.Content) + len(shown.Type) + len(shown.RoomID) + delayedEventSize
		page.Events, last = append(page.Events, shown), e.Place
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: page}
}

// look answers with one of the user's delayed events.
func (a *API) look(req *http.Request, device *userapi.Device, d dialect, delayID string) util.JSONResponse {
	leave, err := a.enter(req, device, a.users)
	if err != nil {
		return errorResponse(req, err)
	}
	defer leave()
	e, err := a.timers.DelayedEvent(req.Context(), delayID, device.UserID)
	if err != nil {
		return delayedResponse(req, err)
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: a.newDelayedEvent(req.Context(), e, d)}
}
