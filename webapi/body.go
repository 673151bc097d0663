package webapi

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

// Bounded returns a handler that limits the size of a request's body, and the time that the body may take to arrive.
func Bounded(size int64, wait time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		req = req.WithContext(req.Context()) // a copy
		req.Body = BoundBody(w, req.Body, size, wait)
		next.ServeHTTP(w, req)
	})
}

// BoundBody returns a body of limited size. The body must arrive within wait, counted from now. net/http lifts the read deadline at the end
// of the body. If reading fails, the deadline stays, so net/http does not wait forever for the rest. If the ResponseWriter has no
// deadlines, only the size is limited.
func BoundBody(w http.ResponseWriter, body io.ReadCloser, size int64, wait time.Duration) io.ReadCloser {
	if body == http.NoBody { // nothing would lift the deadline, and it would cancel the request when it passes
		return body
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(wait))
	return http.MaxBytesReader(w, body, size)
}

// ReadBody reads a body that http.MaxBytesReader limits. Its errors are answers for the client.
func ReadBody(body io.Reader) ([]byte, error) {
	data, err := io.ReadAll(body)
	var size *http.MaxBytesError
	switch {
	case errors.As(err, &size):
		return nil, TooLarge(fmt.Sprintf("The body must be at most %d bytes", size.Limit))
	case err != nil:
		return nil, BadRequest(spec.NotJSON("The body could not be read"))
	}
	return data, nil
}

// CheckObject returns an error if data is not a JSON object. In the text of the error, data is called what.
func CheckObject(data []byte, what string) error {
	switch {
	case !utf8.Valid(data) || !gjson.ValidBytes(data):
		return BadRequest(spec.NotJSON(what + " must be a JSON object"))
	case !gjson.ParseBytes(data).IsObject():
		return BadRequest(spec.BadJSON(what + " must be a JSON object"))
	}
	return nil
}
