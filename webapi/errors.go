package webapi

import (
	"context"
	"errors"
	"net/http"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

// ErrTooLarge is M_TOO_LARGE, which gomatrixserverlib does not name.
const ErrTooLarge spec.MatrixErrorCode = "M_TOO_LARGE"

// RequestError is an error in the request itself, and what it is answered with.
type RequestError struct {
	Code int
	spec.MatrixError
}

// Refuse returns the error of a request that is answered with this status and error.
func Refuse(code int, e spec.MatrixError) *RequestError { return &RequestError{code, e} }

// BadRequest returns the error of a request that is answered with 400.
func BadRequest(e spec.MatrixError) *RequestError { return Refuse(http.StatusBadRequest, e) }

// TooLarge returns the error of a request that is answered with 413.
func TooLarge(msg string) *RequestError {
	return Refuse(http.StatusRequestEntityTooLarge, spec.MatrixError{ErrCode: ErrTooLarge, Err: msg})
}

// Response is what the request is answered with.
func (e *RequestError) Response() util.JSONResponse {
	return util.JSONResponse{Code: e.Code, JSON: e.MatrixError}
}

// RateError says that there were too many requests, of one user or one address for example.
type RateError struct{ RetryAfter time.Duration }

func (e *RateError) Error() string { return "too many requests" }

// Limited returns a *RateError if a request is allowed only after some time.
func Limited(wait time.Duration) error {
	if wait > 0 {
		return &RateError{RetryAfter: wait}
	}
	return nil
}

// MayRequest counts a request of a user, and returns a *RateError if it is above the limit. Application services are exempt.
func MayRequest(users *limits.Limiter[string], device *userapi.Device) error {
	if device.AccountType == userapi.AccountTypeAppService {
		return nil
	}
	return Limited(users.Wait(device.UserID, time.Now()))
}

// ErrorResponse is the answer to a request that failed. An error that is neither a *RequestError nor a *RateError is the server's own. It is
// logged with failed, which says what did not work, and the client does not see it.
func ErrorResponse(req *http.Request, err error, failed string) util.JSONResponse {
	var (
		request *RequestError
		rate    *RateError
	)
	switch {
	case errors.As(err, &request):
		return request.Response()
	case errors.As(err, &rate):
		return limits.Exceeded("Too many requests", rate.RetryAfter)
	}
	level := logrus.ErrorLevel
	if errors.Is(req.Context().Err(), context.Canceled) { // the client hung up
		level = logrus.DebugLevel
	}
	util.GetLogger(req.Context()).WithError(err).Log(level, failed)
	return util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.Unknown("Internal server error")}
}
