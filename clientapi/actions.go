package clientapi

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Actor acts upon delayed events, which it finds by their delay IDs. If owner is not "", the event must belong to that user.
type Actor interface {
	AllowDelayed(delayID string) (known bool, wait time.Duration)
	RestartDelayed(ctx context.Context, delayID, owner string) error
	SendDelayed(ctx context.Context, delayID, owner string) error
	CancelDelayed(ctx context.Context, delayID, owner string) error
}

// act restarts, sends or cancels a delayed event. The owner is "" on paths that need no authentication.
func (a *API) act(req *http.Request, d dialect, delayID, action, owner string) util.JSONResponse {
	do := map[string]func() error{
		"restart": func() error { return a.timers.RestartDelayed(req.Context(), delayID, owner) },
		"send":    func() error { return a.timers.SendDelayed(req.Context(), delayID, owner) },
		"cancel":  func() error { return a.timers.CancelDelayed(req.Context(), delayID, owner) },
	}[action]
	if do == nil {
		return util.JSONResponse{Code: http.StatusNotFound, JSON: spec.Unrecognized("The action must be restart, send or cancel")}
	}
	known, wait := a.timers.AllowDelayed(delayID)
	err := a.guesses.mayAsk(req, known, wait)
	if err != nil {
		return errorResponse(req, err)
	}
	err = do()
	var done *expiration.FinalisedError
	if errors.As(err, &done) {
		switch {
		case action == "send" && done.Final.Sent(), action == "cancel" && done.Final.Cancelled():
			err = nil
		case d == stable:
			return util.JSONResponse{Code: http.StatusConflict, JSON: spec.Unknown("The delayed event was finalised already")}
		default:
			err = expiration.ErrNotFound
		}
	}
	switch {
	case errors.Is(err, expiration.ErrNotFound):
		return noDelayedEvent()
	case err != nil:
		return errorResponse(req, err)
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: struct{}{}}
}

func noDelayedEvent() util.JSONResponse {
	return util.JSONResponse{Code: http.StatusNotFound, JSON: spec.NotFound("There is no such delayed event")}
}
