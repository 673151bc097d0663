// Package around is for routes that change an answer of Dendrite's. Such a route is registered before Dendrite's route, and asks
// it for the answer.
package around

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/util"
)

// asked marks the context of a request that is passed on to Dendrite.
type asked struct{}

// First matches all requests except those that are passed on to Dendrite. Each of these routes must have it as a matcher.
func First(req *http.Request, _ *mux.RouteMatch) bool {
	return req.Context().Value(asked{}) == nil
}

// Dendrite returns the answer of Dendrite's route. ok is false if it is not a success; then the caller answers the same.
func Dendrite(router http.Handler, req *http.Request) (answer util.JSONResponse, body []byte, ok bool) {
	kept := buffer{header: http.Header{}, code: http.StatusOK}
	router.ServeHTTP(&kept, req.WithContext(context.WithValue(req.Context(), asked{}, true)))
	body = kept.body.Bytes()
	return util.JSONResponse{Code: kept.code, JSON: json.RawMessage(body)}, body, kept.code == http.StatusOK
}

// buffer keeps an answer.
type buffer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (b *buffer) Header() http.Header         { return b.header }
func (b *buffer) WriteHeader(code int)        { b.code = code }
func (b *buffer) Write(p []byte) (int, error) { return b.body.Write(p) }
