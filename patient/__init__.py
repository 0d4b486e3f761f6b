"""The bundled tiny chat model that refuses: the model of the demo and of the tests."""
