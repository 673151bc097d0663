package clientapi

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/gorilla/mux"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	methodRefresh = "refresh"
	methodEnd     = "end"

	// maxKeepAliveSize is the limit for the body of a keep-alive, in bytes (contract, section 2).
	maxKeepAliveSize = 4 << 10
	// keepAliveReadTimeout is how long the body may take to arrive.
	keepAliveReadTimeout = 10 * time.Second
	// tokenKey is the field of the token, in requests and answers.
	tokenKey = "expire_refresh_token"
)

// keepAlive answers PUT /_matrix/client/v3/expiration/{refresh_method} (contract, section 2). The body has been read
// within its limits, or reading it fails as it did.
func (a *API) keepAlive(req *http.Request) util.JSONResponse {
	method := mux.Vars(req)["refresh_method"]
	result, res := a.doKeepAlive(req, method)
	a.metrics.keepAlives.WithLabelValues(method, result).Inc()
	return res
}

// doKeepAlive returns the answer and the result as the metrics name it.
func (a *API) doKeepAlive(req *http.Request, method string) (string, util.JSONResponse) {
	token, badRequest := readToken(req.Body)
	if badRequest != nil {
		return "bad_request", *badRequest
	}
	hash := expiration.HashToken(token)
	known := a.timers.Known(hash)
	if wait := a.limits.wait(req, hash, known, time.Now()); wait > 0 {
		return "limited", limitExceeded("Too many requests for the keep-alive endpoint", wait)
	}
	if !known {
		return "not_found", errorResponse(req, expiration.ErrNotFound)
	}
	var err error
	if method == methodRefresh {
		err = a.timers.Refresh(req.Context(), hash)
	} else {
		err = a.timers.End(req.Context(), hash)
	}
	switch {
	case err == nil:
		return "ok", util.JSONResponse{Code: http.StatusOK, JSON: struct{}{}}
	case errors.Is(err, expiration.ErrNotFound):
		return "not_found", errorResponse(req, err)
	case errors.As(err, new(*expiration.DropError)):
		return "forbidden", errorResponse(req, err)
	}
	return "error", errorResponse(req, err)
}

// readToken returns the token of a request, or the answer to a bad one.
func readToken(body io.Reader) (string, *util.JSONResponse) {
	data, err := io.ReadAll(body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return "", &util.JSONResponse{Code: http.StatusRequestEntityTooLarge, JSON: spec.MatrixError{
			ErrCode: errTooLarge, Err: "The body must be at most 4096 bytes",
		}}
	case err != nil:
		return "", badRequest(spec.NotJSON("The body could not be read"))
	case !utf8.Valid(data) || !json.Valid(data):
		return "", badRequest(spec.NotJSON("The body must be a JSON object"))
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(data, &fields) != nil || fields == nil {
		return "", badRequest(spec.BadJSON("The body must be a JSON object"))
	}
	value, ok := fields[tokenKey]
	if !ok {
		return "", badRequest(spec.MissingParam(tokenKey + " is missing"))
	}
	var token *string
	if json.Unmarshal(value, &token) != nil || token == nil {
		return "", badRequest(spec.BadJSON(tokenKey + " must be a string"))
	}
	return *token, nil
}

func badRequest(e spec.MatrixError) *util.JSONResponse {
	return &util.JSONResponse{Code: http.StatusBadRequest, JSON: e}
}
