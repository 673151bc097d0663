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
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
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

// actUnstable answers an action on the unstable paths. It needs no access token, because the delay ID is the authority, so an invalid token
// counts as none. An application service that names a user for whom it may not act is refused.
func (a *API) actUnstable(req *http.Request, userAPI userapi.QueryAcccessTokenAPI, delayID, action string) util.JSONResponse {
	var device *userapi.Device
	if req.Header.Get("Authorization") != "" || req.URL.Query().Has("access_token") {
		var refused *util.JSONResponse
		if device, refused = auth.VerifyUserFromRequest(req, userAPI); refused != nil && refused.Code == http.StatusForbidden {
			return *refused
		}
	}
	return a.act(req, unstable, device, delayID, action)
}

// act answers an action.
func (a *API) act(req *http.Request, d dialect, device *userapi.Device, delayID, action string) util.JSONResponse {
	if !isAction(action) {
		return util.JSONResponse{Code: http.StatusNotFound, JSON: spec.Unrecognized(badAction)}
	}
	var err error
	if device != nil {
		err = a.actAsOwner(req, device, delayID, action)
	} else {
		err = a.actByID(req, delayID, action)
	}
	return actionResponse(req, d, action, err)
}

// actAsOwner acts for a user, to whom the event must belong. The action counts among those of the user. Only a send is costly: a restart must
// not wait for requests that hang.
func (a *API) actAsOwner(req *http.Request, device *userapi.Device, delayID, action string) error {
	if err := webapi.MayRequest(a.actors, device); err != nil {
		return err
	}
	if action == "send" {
		leave, err := a.place(req, device)
		if err != nil {
			return err
		}
		defer leave()
	}
	return a.do(req.Context(), delayID, device.UserID, action)
}

// actByID acts for anybody who has the delay ID. The action counts among those with this ID. With an unknown ID it counts as a guess. The
// ID of a finalised event is no guess: a service that acts for many users behind one address learns from the answers what has ended. To
// tell them apart takes a look-up in the database. How many there are with the same ID is limited, too.
func (a *API) actByID(req *http.Request, delayID, action string) error {
	known, wait := a.timers.AllowDelayed(delayID)
	if !known {
		wait = a.ended.Wait(expiration.HashToken(delayID), time.Now())
	}
	if err := webapi.Limited(wait); err != nil {
		return err
	}
	err := a.do(req.Context(), delayID, "", action)
	if !known && errors.Is(err, expiration.ErrNotFound) {
		if tooMany := a.guesses.count(req); tooMany != nil {
			return tooMany
		}
	}
	return err
}

// do restarts, sends or cancels a delayed event.
func (a *API) do(ctx context.Context, delayID, owner, action string) error {
	switch action {
	case "restart":
		return a.timers.RestartDelayed(ctx, delayID, owner)
	case "send":
		return a.timers.SendDelayed(ctx, delayID, owner)
	}
	return a.timers.CancelDelayed(ctx, delayID, owner)
}
