package clientapi

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/matrix-org/dendrite/clientapi/auth"
	userapi "github.com/matrix-org/dendrite/userapi/api"
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

// badAction is the error for an action that does not exist.
const badAction = "The action must be restart, send or cancel"

func isAction(action string) bool {
	return action == "restart" || action == "send" || action == "cancel"
}

// owner returns whose access token a request has, or nil if it has no valid one. An unstable action needs none, because the delay ID is the
// authority.
func owner(req *http.Request, userAPI userapi.QueryAcccessTokenAPI) *userapi.Device {
	if req.Header.Get("Authorization") == "" && !req.URL.Query().Has("access_token") {
		return nil
	}
	device, _ := auth.VerifyUserFromRequest(req, userAPI)
	return device
}

// act restarts, sends or cancels a delayed event. If device is not nil, the event must belong to its user, and the action counts among those
// of the user.
func (a *API) act(req *http.Request, d dialect, device *userapi.Device, delayID, action string) util.JSONResponse {
	if !isAction(action) {
		return util.JSONResponse{Code: http.StatusNotFound, JSON: spec.Unrecognized(badAction)}
	}
	owner := ""
	if device != nil {
		leave, err := a.enter(req, device, a.actors)
		if err != nil {
			return errorResponse(req, err)
		}
		defer leave()
		owner = device.UserID
	}
	known, wait := a.timers.AllowDelayed(delayID)
	err := a.guesses.mayAsk(req, known, wait)
	if err != nil {
		return errorResponse(req, err)
	}
	switch ctx := req.Context(); action {
	case "restart":
		err = a.timers.RestartDelayed(ctx, delayID, owner)
	case "send":
		err = a.timers.SendDelayed(ctx, delayID, owner)
	case "cancel":
		err = a.timers.CancelDelayed(ctx, delayID, owner)
	}
	var done *expiration.FinalisedError
	if errors.As(err, &done) {
		switch {
		case action == "send" && done.Final.Sent(), action == "cancel" && !done.Final.Sent():
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
