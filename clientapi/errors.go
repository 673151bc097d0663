package clientapi

import (
	"encoding/json"
	"errors"
	"net/http"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// errorResponse is the answer to a request that failed. In this file alone, errors become Matrix error codes.
func errorResponse(req *http.Request, err error) util.JSONResponse {
	var (
		field   *fieldError
		limit   *expiration.LimitError
		dropped *expiration.DropError
		delay   *delayError
		refused *expiration.RefusedError
	)
	switch {
	case errors.As(err, new(*webapi.RequestError)), errors.As(err, new(*webapi.RateError)): // answered below
	case errors.As(err, &delay):
		return delay.response()
	case errors.As(err, &field):
		return util.JSONResponse{Code: http.StatusBadRequest, JSON: spec.InvalidParam(err.Error())}
	case errors.Is(err, expiration.ErrNotFound):
		return util.JSONResponse{Code: http.StatusNotFound, JSON: spec.NotFound("No event is running with this token")}
	case errors.Is(err, expiration.ErrTooLarge):
		return util.JSONResponse{Code: http.StatusRequestEntityTooLarge, JSON: spec.MatrixError{
			ErrCode: webapi.ErrTooLarge, Err: "The event fits, but its closing event would be too large",
		}}
	case errors.As(err, &limit):
		return limits.Exceeded("Too many of your events are running, or scheduled", limit.RetryAfter)
	case errors.As(err, &dropped): // whatever its cause is
		return util.JSONResponse{Code: http.StatusForbidden, JSON: spec.Forbidden("The sender may no longer send this event")}
	case errors.As(err, &refused):
		return util.JSONResponse{Code: refused.Code, JSON: refused.Response}
	}
	return webapi.ErrorResponse(req, err, "Failed to handle an expiring or delayed event")
}

// delayedResponse is errorResponse for a request that names a delayed event.
func delayedResponse(req *http.Request, err error) util.JSONResponse {
	if errors.Is(err, expiration.ErrNotFound) {
		return util.JSONResponse{Code: http.StatusNotFound, JSON: spec.NotFound("There is no such delayed event")}
	}
	return errorResponse(req, err)
}

// actionResponse is the answer to an action on a delayed event. An action that has been done already succeeds once more.
func actionResponse(req *http.Request, d dialect, action string, err error) util.JSONResponse {
	var done *expiration.FinalisedError
	switch finalised := errors.As(err, &done); {
	case err == nil, finalised && action == "send" && done.Final.Sent(), finalised && action == "cancel" && !done.Final.Sent():
		return util.JSONResponse{Code: http.StatusOK, JSON: struct{}{}}
	case finalised && d == stable:
		return util.JSONResponse{Code: http.StatusConflict, JSON: spec.Unknown("The delayed event was finalised already")}
	case finalised:
		err = expiration.ErrNotFound
	}
	return delayedResponse(req, err)
}

// Explain returns the Matrix error that the owner of a delayed event is shown when the event could not be sent. It resembles the answer to
// a request that fails in the same way. But it says nothing about a retry, because nobody can repeat the send of a finalised event.
func Explain(err error) json.RawMessage {
	var (
		refused *expiration.RefusedError
		limit   *expiration.LimitError
		dropped *expiration.DropError
		shown   spec.MatrixError
	)
	switch {
	case errors.As(err, &refused):
		return refused.Response
	case errors.Is(err, expiration.ErrTooLarge):
		shown = spec.MatrixError{ErrCode: webapi.ErrTooLarge, Err: "The closing event would be too large"}
	case errors.As(err, &limit):
		shown = spec.MatrixError{ErrCode: spec.ErrorLimitExceeded, Err: "Too many of your events are running, or were due at once"}
	case !errors.As(err, &dropped):
		shown = spec.Unknown("Internal server error")
	case dropped.Reason == expiration.Unsendable, dropped.Reason == expiration.Unanswered:
		shown = spec.Unknown("The homeserver was not able to send this event")
	case dropped.Reason == expiration.RoomGone:
		shown = spec.NotFound("The room is gone")
	default:
		shown = spec.Forbidden("The sender may no longer send this event")
	}
	response, _ := json.Marshal(shown) // never fails
	return response
}
