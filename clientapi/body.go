package clientapi

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// within limits the time in which the body of a request must arrive.
func within(limit time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		control := http.NewResponseController(w)
		_ = control.SetReadDeadline(time.Now().Add(limit))
		req = req.WithContext(req.Context()) // a copy
		req.Body = &timedBody{req.Body, control}
		next.ServeHTTP(w, req)
	})
}

// timedBody lifts the time limit at the end of the body: a deadline that passes later would cancel the request.
type timedBody struct {
	io.ReadCloser
	control *http.ResponseController
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		_ = b.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// readAll reads a body of limited size.
func readAll(body io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	switch {
	case err != nil:
		return nil, badRequest(spec.NotJSON("The body could not be read"))
	case int64(len(data)) > limit:
		return nil, tooLarge(fmt.Sprintf("The body must be at most %d bytes", limit))
	}
	return data, nil
}

func tooLarge(msg string) *requestError {
	return &requestError{http.StatusRequestEntityTooLarge, spec.MatrixError{ErrCode: errTooLarge, Err: msg}}
}

// checkObject returns an error if data is not a JSON object. The error calls it what.
func checkObject(data []byte, what string) error {
	switch {
	case !utf8.Valid(data) || !gjson.ValidBytes(data):
		return badRequest(spec.NotJSON(what + " must be a JSON object"))
	case !gjson.ParseBytes(data).IsObject():
		return badRequest(spec.BadJSON(what + " must be a JSON object"))
	}
	return nil
}
