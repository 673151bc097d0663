package clientapi

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
)

// form says where a request has its delay. It decides how a bad delay is answered.
type form int

const (
	queryForm     form = iota // in the query of a send
	dedicatedForm             // in the body, on the stable path
	dedicatedUnstableForm
)

// delayError is a bad delay.
type delayError struct {
	name string // of the parameter
	max  time.Duration
	form form
	// tooLong: the delay is a valid number, but greater than max.
	tooLong bool
}

func (e *delayError) Error() string {
	return fmt.Sprintf("%s must be a whole number of milliseconds from 1 to %d", e.name, e.max.Milliseconds())
}

// response is the answer to a bad delay. matrix-js-sdk 43 asks for a shorter delay only after the answer of the query form.
func (e *delayError) response() util.JSONResponse {
	answer := struct {
		spec.MatrixError
		Code     string `json:"org.matrix.msc4140.errcode,omitempty"`
		MaxDelay int64  `json:"org.matrix.msc4140.max_delay,omitempty"`
	}{MatrixError: spec.InvalidParam(e.Error())}
	switch {
	case !e.tooLong:
	case e.form == dedicatedForm:
		answer.ErrCode = "M_DELAY_TOO_LARGE"
	case e.form == dedicatedUnstableForm:
		answer.ErrCode, answer.MaxDelay = "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE", e.max.Milliseconds()
	default:
		answer.ErrCode, answer.Code, answer.MaxDelay = spec.ErrorUnknown, "M_MAX_DELAY_EXCEEDED", e.max.Milliseconds()
	}
	return util.JSONResponse{Code: http.StatusBadRequest, JSON: answer}
}

// parseDelay reads a delay in milliseconds.
func (a *API) parseDelay(name, value string, f form) (time.Duration, error) {
	failed := &delayError{name: name, max: a.cfg.MaxDelay, form: f}
	if strings.Trim(value, "0123456789") != "" { // ParseInt accepts a sign
		return 0, failed
	}
	ms, err := strconv.ParseInt(value, 10, 64) // the largest int64 if the number is greater
	if err != nil && !errors.Is(err, strconv.ErrRange) || ms <= 0 {
		return 0, failed
	}
	if ms > a.cfg.MaxDelay.Milliseconds() {
		failed.tooLong = true
		return 0, failed
	}
	return time.Duration(ms) * time.Millisecond, nil
}
