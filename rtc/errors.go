package rtc

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// errorUnauthorized is an error code that gomatrixserverlib does not name.
const errorUnauthorized spec.MatrixErrorCode = "M_UNAUTHORIZED"

// Errors of Participants, Delegations and TokenDelegations. Each is one of several answers to a client; any other error is a fault of the
// server, unless its interface says otherwise.
var (
	// ErrNotJoined: the user is not joined to the room.
	ErrNotJoined = errors.New("the user is not joined to the room")
	// ErrTooMany: the user has too many participants in one room.
	ErrTooMany = errors.New("too many participants of one user")
	// ErrCrowded: too many timers of the user wait to be handed over.
	ErrCrowded = errors.New("too many timers of one user are handed over")
	// ErrNotScheduled: the user has no such delayed event in this room, or it has been sent or cancelled.
	ErrNotScheduled = errors.New("no such delayed event is scheduled")
	// ErrTooShort: the duration of the token's event is too short for the timer to be kept alive by what LiveKit says.
	ErrTooShort = errors.New("the duration is too short")
)

// What requests are refused with (MSC4195). The text for a user who is not joined is the same for a room that does not exist, so that it
// tells nothing about rooms and users.
var (
	errNotJoined       = forbidden("The user is not joined to this room")
	errServerNotJoined = forbidden("The server of the SFU is not joined to this room")
	errNotOfOrigin     = forbidden("The user is not of the server that asks")
	errNotOurs         = webapi.BadRequest(spec.InvalidParam("url is not an SFU of this server"))
	errMemberID        = spec.InvalidParam("The member ID could be that of a user of another server")
	errTooShort        = webapi.BadRequest(spec.InvalidParam("The event's duration is too short for an SFU to keep it alive"))
	errOtherServer     = webapi.Refuse(http.StatusBadGateway, spec.Unknown("The server of the SFU gives no token"))
	// errTooMany has a limit that recovers over days.
	errTooMany = &webapi.RateError{RetryAfter: time.Hour}
	errCrowded = &webapi.RateError{RetryAfter: crowdedPause}
)

// What the service's requests are refused with, beside these.
var (
	errOpenID = webapi.Refuse(http.StatusUnauthorized, spec.MatrixError{ErrCode: errorUnauthorized, Err: "The OpenID token is not valid for this user"})
	errNoCall = forbidden("There is no call, and users of this server cannot begin one here")
	// The leave event of a user of another server is not here. Clients know the first error: they try again without delay_id.
	errRemoteDelay      = webapi.BadRequest(spec.BadJSON("delay_id must be that of a delayed event of this server"))
	errRemoteDelegation = forbidden("Only delayed events of this server can be handed over")
	errStopping         = webapi.Refuse(http.StatusServiceUnavailable, spec.Unknown("The server is stopping"))
)

func forbidden(msg string) *webapi.RequestError {
	return webapi.Refuse(http.StatusForbidden, spec.Forbidden(msg))
}

// handedOn is the error of another server, which the client gets as it is, if it is one that says what is wrong with the request.
func handedOn(status int, code spec.MatrixErrorCode, text string) error {
	switch {
	case status == http.StatusForbidden && code == spec.ErrorForbidden, status == http.StatusBadRequest && code == spec.ErrorInvalidParam:
		return webapi.Refuse(status, spec.MatrixError{ErrCode: code, Err: text})
	}
	return errOtherServer
}

// refusalOf returns the refusal for an error of Participants, Delegations or TokenDelegations, or the error itself if there is none. That for
// ErrNotScheduled depends on the API, see handOver.
func refusalOf(err error) error {
	switch {
	case errors.Is(err, ErrNotJoined):
		return errNotJoined
	case errors.Is(err, ErrTooMany):
		return errTooMany
	case errors.Is(err, ErrCrowded):
		return errCrowded
	case errors.Is(err, ErrTooShort):
		return errTooShort
	}
	return err
}

// respond is the answer to a request with this result or error.
func respond(req *http.Request, result any, err error) util.JSONResponse {
	if err != nil {
		return webapi.ErrorResponse(req, err, "Failed to make a token of LiveKit, or to take over a leave event")
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: result}
}

// stopping returns errStopping in place of a failure whose cause is that the server stops, which cancels all requests.
func stopping(ctx context.Context, err error) error {
	var refused *webapi.RequestError
	if err != nil && errors.Is(ctx.Err(), context.Canceled) && !errors.As(err, &refused) {
		return errStopping
	}
	return err
}
